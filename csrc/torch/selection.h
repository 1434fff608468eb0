// What select_blocks and estimate_blocks share: settings in, outputs and kernel parameters out.
#pragma once

#include <cstdint>
#include <optional>

#include "torch/checks.h"
#include "torch/cuda_context.h"

namespace prism {

// Settings of a selection, checked.
struct SelectionSettings {
  int64_t q_len;
  int64_t k_len;
  SelectionBands bands;
  double top_p;
  int64_t keep_sink;
  int64_t keep_recent;
  std::optional<double> keep_above;
  bool causal;
  int64_t q_block_size;
  int64_t k_block_size;
};

#ifdef PRISM_WITH_CUDA

struct SelectionShape {
  int64_t batch;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
};

struct Selection {
  Tensor bits;
  Tensor counts;
  Tensor workspace;  // kept until the launches; the allocator orders its reuse
  SelectBlocksParams params;
};

// Allocates beside `like`, on the context's device. The views of the means are left for the caller
// to set. `keys` names the tensor that may be too long.
Selection make_selection(const CudaContext& context, const char* op, const char* keys,
                         const Tensor& like, const SelectionShape& shape,
                         const SelectionSettings& settings);

#endif  // PRISM_WITH_CUDA

}  // namespace prism
