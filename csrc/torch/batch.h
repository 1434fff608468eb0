// What q, k, v and the batch arguments of a call say together: the batch is dense, (batch, heads,
// length, head_dim), or ragged: sequences of different lengths, packed or in pages.
#pragma once

#include <cstdint>

#include "torch/arguments.h"
#include "torch/checks.h"

namespace prism {

struct Shape {
  bool ragged;
  int64_t batch;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t q_len;  // of a ragged batch the most that a sequence may have
  int64_t k_len;

  int64_t q_blocks(const BlockArguments& blocks) const {
    return ceil_div(q_len, blocks.q_block_size);
  }
  int64_t k_blocks(const BlockArguments& blocks) const {
    return ceil_div(k_len, blocks.k_block_size);
  }
  int64_t words(const BlockArguments& blocks) const { return ceil_div(k_blocks(blocks), 32); }
};

// The shape that the arguments agree on: one device and dtype (but for fp8 k and v, where those
// are allowed), whole GQA groups. What device tensors contain is not looked at: the kernels hold it
// within the tensors. `v` may be null: the op has none.
Shape check_batch(const char* op, const Tensor& q, const Tensor& k, const Tensor* v,
                  const SequenceArguments& sequences, Fp8 fp8);

// The same of a call whose keys were pooled before into `pooled` (batch, kv_heads, ..., ...):
// k_len of them. Only dense batches have such.
Shape check_pooled_batch(const char* op, const Tensor& q, const char* name, const Tensor& pooled,
                         std::optional<int64_t> k_len, const SequenceArguments& sequences);

// Ragged sequences of fewer keys, or of fewer queries than a block, keep all that they see; 0:
// none.
void check_dense_below(const char* op, int64_t dense_below, const Shape& shape);

#ifdef PRISM_WITH_CUDA

// Of checked arguments; not ragged for a dense batch.
RaggedBatch make_ragged(const Tensor& q, const Tensor& k, const SequenceArguments& sequences);

// Of q, k, v or an output, in a batch of this shape.
TensorView view(const Tensor& tensor, const Shape& shape);

#endif

}  // namespace prism
