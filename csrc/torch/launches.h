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

// The workspace is left for the caller to set.
SelectParams select_params(const SelectCall& call, const Mask& mask);

// A workspace of kCounterBytes for attention's tile counter and so many bytes behind them.
constexpr int64_t kCounterBytes = 128;  // of the counter, and alignment of what follows it
enum class Counter { kUnused, kCleared };
Tensor new_workspace(const CudaContext& context, const Tensor& like, int64_t bytes,
                     Counter counter);

// Launch a selection into the mask. Returns the workspace, and with it attention's tile counter.
Tensor select(const CudaContext& context, const BandsCall& call, const Mask& mask,
              Counter counter = Counter::kUnused);
Tensor select(const CudaContext& context, const GridCall& call, const Mask& mask,
              Counter counter = Counter::kUnused);

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

}  // namespace prism

#endif  // PRISM_WITH_CUDA
