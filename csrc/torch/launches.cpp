#include "torch/launches.h"

#ifdef PRISM_WITH_CUDA

#include <cstdint>

#include "kernels/keep/keep_blocks.h"

namespace prism {

Mask new_mask(const Tensor& like, const Shape& shape, const BlockArguments& blocks) {
  const int64_t q_blocks = shape.q_blocks(blocks);
  return {
      new_empty(like, {shape.batch, shape.q_heads, q_blocks, shape.words(blocks)}, ScalarType::Int),
      new_empty(like, {shape.batch, shape.q_heads, q_blocks}, ScalarType::Int)};
}

Tensor new_counted_workspace(const Tensor& like, int64_t bytes) {
  return new_workspace(like, kCounterBytes + bytes);
}

void check_key_blocks(const SelectCall& call) {
  const int64_t k_blocks = call.shape.k_blocks(call.blocks);
  PRISM_CHECK(k_blocks <= kMaxSelectKeyBlocks, call.op,
              call.shape.ragged ? "max_seqlen_k" : (call.k ? "k" : "k_len"), " has ", k_blocks,
              " blocks; allowed on cuda: at most ", kMaxSelectKeyBlocks);
}

SelectParams select_params(const SelectCall& call, const Mask& mask) {
  const Shape& shape = call.shape;
  SelectParams params = {};
  params.bits = static_cast<uint32_t*>(mask.bits.data_ptr());
  params.counts = static_cast<int32_t*>(mask.counts.data_ptr());
  params.batch = shape.batch;
  params.q_heads = static_cast<int>(shape.q_heads);
  params.kv_heads = static_cast<int>(shape.kv_heads);
  params.q_len = shape.q_len;
  params.k_len = shape.k_len;
  params.q_blocks = shape.q_blocks(call.blocks);
  params.k_blocks = shape.k_blocks(call.blocks);
  params.head_dim = static_cast<int>(shape.head_dim);
  params.q_block_size = static_cast<int>(call.blocks.q_block_size);
  params.k_block_size = static_cast<int>(call.blocks.k_block_size);
  params.rules = call.rules;
  params.causal = call.blocks.causal;
  if (call.k) {
    params.ragged = make_ragged(call.on, *call.k, call.sequences);
  }
  return params;
}

int window_of(const AttentionCall& call) {
  const std::optional<int64_t> window = call.scores.window_left;
  return window && *window < call.shape.k_len ? static_cast<int>(*window) : -1;
}

void keep_short(const CudaContext& context, const SelectParams& select, int64_t dense_below) {
  if (dense_below == 0) {
    return;
  }
  KeepBlocksParams params;
  params.select = select;
  params.dense_below = dense_below;
  params.all = false;
  context.check(launch_keep_blocks(params, context.stream()));
}

}  // namespace prism

#endif  // PRISM_WITH_CUDA
