// What the ops for ragged batches share: sequences of different lengths, packed or in pages.
#pragma once

#include <cstdint>
#include <optional>

#include "torch/checks.h"

namespace prism {

// What the arguments say about a ragged batch, checked. What the device tensors contain is not
// looked at: the kernels hold it within the tensors.
struct RaggedShape {
  int64_t size;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
};

// `v` may be null: the op has none. `fp8` is about k and v.
RaggedShape check_ragged(const char* op, const Tensor& q, const Tensor& k, const Tensor* v,
                         const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                         const std::optional<Tensor>& seqused_k,
                         const std::optional<Tensor>& block_table, int64_t max_seqlen_q,
                         int64_t max_seqlen_k, Fp8 fp8);

#ifdef PRISM_WITH_CUDA

// Of checked arguments.
RaggedBatch make_ragged(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                        const std::optional<Tensor>& cu_seqlens_k,
                        const std::optional<Tensor>& seqused_k,
                        const std::optional<Tensor>& block_table);

// Of (rows, heads, head_dim), or of pages (pages, page_size, heads, head_dim).
TensorView ragged_view(const Tensor& tensor);

#endif

}  // namespace prism
