#include "torch/grid_selection.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <limits>

#include "torch/cuda_context.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/grid/estimate_grid.h"
#endif

namespace prism {

GridSettings check_grid_settings(const char* op, int64_t head_dim, double top_p, int64_t keep_sink,
                                 int64_t keep_recent, std::optional<double> keep_above,
                                 std::optional<double> scale, bool causal, int64_t q_block_size,
                                 int64_t k_block_size) {
  check_block_sizes(op, q_block_size, k_block_size);
  check_rules(op, top_p, keep_sink, keep_recent, keep_above);
  return {top_p,  keep_sink,    keep_recent, keep_above, check_scale(op, scale, head_dim),
          causal, q_block_size, k_block_size};
}

#ifdef PRISM_WITH_CUDA
std::tuple<Tensor, Tensor> select_on_grid(const char* op, const char* keys, const Tensor& q,
                                          const GridSizes& sizes, EstimateGridParams params,
                                          const GridSettings& settings) {
  const CudaContext context(op, q);
  const NvtxRange range("prism.estimate");
  params.scale = static_cast<float>(settings.scale);
  params.dtype = kernel_dtype(q);
  SelectBlocksParams& select = params.select;
  select.batch = sizes.batch;
  select.q_heads = static_cast<int>(sizes.q_heads);
  select.kv_heads = static_cast<int>(sizes.kv_heads);
  select.q_len = sizes.q_len;
  select.k_len = sizes.k_len;
  select.q_blocks = ceil_div(sizes.q_len, settings.q_block_size);
  select.k_blocks = ceil_div(sizes.k_len, settings.k_block_size);
  select.head_dim = static_cast<int>(sizes.head_dim);
  select.q_block_size = static_cast<int>(settings.q_block_size);
  select.k_block_size = static_cast<int>(settings.k_block_size);
  select.top_p = settings.top_p;
  select.keep_above = settings.keep_above.value_or(std::numeric_limits<double>::infinity());
  select.keep_sink = settings.keep_sink;
  select.keep_recent = settings.keep_recent;
  select.causal = settings.causal;
  PRISM_CHECK(select.k_blocks <= kMaxSelectKeyBlocks, op, keys, " has ", select.k_blocks,
              " blocks; allowed on cuda: at most ", kMaxSelectKeyBlocks);
  int64_t bytes = 0;
  context.check(grid_workspace_bytes(params, &bytes));
  const Tensor bits =
      new_empty(q, {sizes.batch, sizes.q_heads, select.q_blocks, ceil_div(select.k_blocks, 32)},
                ScalarType::Int);
  const Tensor counts =
      new_empty(q, {sizes.batch, sizes.q_heads, select.q_blocks}, ScalarType::Int);
  const Tensor workspace = new_empty(q, {ceil_div(bytes, 4)}, ScalarType::Float);
  select.workspace = workspace.data_ptr();
  select.bits = static_cast<uint32_t*>(bits.data_ptr());
  select.counts = static_cast<int32_t*>(counts.data_ptr());
  context.check(launch_estimate_grid(params, context.sm(), context.stream()));
  return {bits, counts};
}
#endif

}  // namespace prism
