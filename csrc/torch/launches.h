// What the ops launch on CUDA, in pieces that prefill puts together.
#pragma once

#include "torch/cuda_context.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA

#include <cstdint>

namespace prism {

// The outputs of a selection.
struct Mask {
  Tensor bits;
  Tensor counts;
};
Mask new_mask(const Tensor& like, const Shape& shape, const BlockArguments& blocks);

// Before anything is allocated: rows that the kernels of estimators have room for.
void check_key_blocks(const SelectCall& call);

// A tile counter in kCounterBytes, and `bytes` behind it.
Tensor new_counted_workspace(const Tensor& like, int64_t bytes);

// The workspace is left for the caller to set.
SelectParams select_params(const SelectCall& call, const Mask& mask);

// Launch a selection into the mask. Returns the workspace, whose tile counter is not used.
Tensor select(const CudaContext& context, const BandsCall& call, const Mask& mask);
Tensor select(const CudaContext& context, const GridCall& call, const Mask& mask);

// After a selection: lets the short sequences of a ragged batch keep all that they see.
void keep_short(const CudaContext& context, const SelectParams& select, int64_t dense_below);

// As the kernels take it: -1 where it hides no key.
int window_of(const AttentionCall& call);

struct Attention {
  Tensor out;
  Tensor lse;
  SparseAttentionParams params;
};

// Refuses what no kernel serves. The tile counter is left for the caller to set.
Attention new_attention(const CudaContext& context, const AttentionCall& call, const Tensor& bits,
                        const Tensor& counts);

void launch(const CudaContext& context, const char* op, const SparseAttentionParams& params);

constexpr int64_t kCounterBytes = 128;  // of the tile counter, and alignment of what follows it

}  // namespace prism

#endif  // PRISM_WITH_CUDA
