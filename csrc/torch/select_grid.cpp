#include <cstdint>

#include "torch/cells.h"
#include "torch/launches.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/grid/select_grid.h"
#endif

namespace prism {

GridCall check_select_grid(const Tensor& q, const std::optional<Tensor>& k,
                           const RuleArguments& rules, std::optional<double> scale,
                           const BlockArguments& blocks, const KeyCellsArguments& pooled,
                           const SequenceArguments& sequences, int64_t dense_below) {
  constexpr const char* kOp = "select_grid";
  const auto& [k_cells, k_factors, k_len] = pooled;
  PRISM_CHECK(k || k_cells, kOp, "k and k_cells are None; expected one of them");
  PRISM_CHECK(!k || !k_cells, kOp, "k and k_cells are both given; expected one of them");
  PRISM_CHECK(!k || !k_factors, kOp, "k_factors is given with k; expected None, or k_cells");
  PRISM_CHECK(!k || !k_len, kOp, "k_len is given with k; expected None, or k_cells");
  const Shape shape = k ? check_batch(kOp, q, *k, /*v=*/nullptr, sequences, Fp8::kRefused)
                        : check_pooled_batch(kOp, q, "k_cells", *k_cells, k_len, sequences);
  check_grid_head_dim(kOp, "q", q);
  if (k_cells) {
    PRISM_CHECK(k_factors, kOp, "k_factors is None; expected the factors of k_cells");
    check_cells(kOp, {"k_cells", *k_cells}, {"k_factors", *k_factors}, "q", q, /*heads=*/-1);
    PRISM_CHECK(ceil_div(shape.k_len, kCellTokens) <= k_cells->size(2), kOp, "k_len is ",
                shape.k_len, "; allowed: 0 to the ", k_cells->size(2), " cells of k_cells times ",
                kCellTokens);
  }
  check_block_sizes(kOp, blocks);
  const KeepRules keep = check_rules(kOp, rules, shape.q_heads);
  const double softmax_scale = check_scale(kOp, scale, shape.head_dim);
  check_dense_below(kOp, dense_below, shape);
  return {
      {kOp, q, k, shape, keep, blocks, sequences, dense_below}, softmax_scale, k_cells, k_factors};
}

#ifdef PRISM_WITH_CUDA

Tensor select(const CudaContext& context, const GridCall& call, const Mask& mask) {
  GridParams params = {};
  params.q = view(call.on, call.shape);
  if (call.k) {
    params.k = view(*call.k, call.shape);
  } else {
    params.k_cells = cell_stats(*call.k_cells, *call.k_factors);
  }
  params.select = select_params(call, mask);
  params.scale = static_cast<float>(call.scale);
  params.dtype = kernel_dtype(call.on);
  int64_t bytes = 0;
  context.check(grid_workspace_bytes(params, &bytes));
  const Tensor workspace = new_counted_workspace(call.on, bytes);
  params.select.workspace = static_cast<char*>(workspace.data_ptr()) + kCounterBytes;
  context.check(launch_select_grid(params, context.sm(), context.stream()));
  keep_short(context, params.select, call.dense_below);
  return workspace;
}

std::tuple<Tensor, Tensor> run(const GridCall& call) {
  const CudaContext context(call.op, call.on);
  const NvtxRange range("prism.select");
  check_key_blocks(call);
  const Mask mask = new_mask(call.on, call.shape, call.blocks);
  select(context, call, mask);
  return {mask.bits, mask.counts};
}

#endif

}  // namespace prism
