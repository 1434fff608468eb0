#include <torch/csrc/stable/ops.h>

#include <limits>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/key_cells.h"
#include "torch/ops.h"
#include "torch/reference.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/grid/estimate_grid.h"
#endif

namespace prism {

namespace {

struct GridSettings {
  double top_p;
  int64_t keep_sink;
  int64_t keep_recent;
  std::optional<double> keep_above;
  double scale;
  bool causal;
  int64_t q_block_size;
  int64_t k_block_size;
};

GridSettings check_settings(const char* op, const Tensor& q, double top_p, int64_t keep_sink,
                            int64_t keep_recent, std::optional<double> keep_above,
                            std::optional<double> scale, bool causal, int64_t q_block_size,
                            int64_t k_block_size) {
  check_block_sizes(op, q_block_size, k_block_size);
  check_rules(op, top_p, keep_sink, keep_recent, keep_above);
  return {top_p,  keep_sink,    keep_recent, keep_above, check_scale(op, scale, q.size(3)),
          causal, q_block_size, k_block_size};
}

#ifdef PRISM_WITH_CUDA
// With where the keys are in `params`: k, or k_cells.
std::tuple<Tensor, Tensor> select_on_grid(const char* op, const char* keys, const Tensor& q,
                                          int64_t kv_heads, int64_t k_len,
                                          EstimateGridParams params,
                                          const GridSettings& settings) {
  const CudaContext context(op, q);
  const NvtxRange range("prism.estimate");
  params.q = view(q);
  params.scale = static_cast<float>(settings.scale);
  params.dtype = kernel_dtype(q);
  SelectBlocksParams& select = params.select;
  select.batch = q.size(0);
  select.q_heads = static_cast<int>(q.size(1));
  select.kv_heads = static_cast<int>(kv_heads);
  select.q_len = q.size(2);
  select.k_len = k_len;
  select.q_blocks = ceil_div(q.size(2), settings.q_block_size);
  select.k_blocks = ceil_div(k_len, settings.k_block_size);
  select.head_dim = static_cast<int>(q.size(3));
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
  const Tensor bits = new_empty(
      q, {q.size(0), q.size(1), select.q_blocks, ceil_div(select.k_blocks, 32)}, ScalarType::Int);
  const Tensor counts = new_empty(q, {q.size(0), q.size(1), select.q_blocks}, ScalarType::Int);
  const Tensor workspace = new_empty(q, {ceil_div(bytes, 4)}, ScalarType::Float);
  select.workspace = workspace.data_ptr();
  select.bits = static_cast<uint32_t*>(bits.data_ptr());
  select.counts = static_cast<int32_t*>(counts.data_ptr());
  context.check(launch_estimate_grid(params, context.sm(), context.stream()));
  return {bits, counts};
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> estimate_grid(const Tensor& q, const Tensor& k, double top_p,
                                         int64_t keep_sink, int64_t keep_recent,
                                         std::optional<double> keep_above,
                                         std::optional<double> scale, bool causal,
                                         int64_t q_block_size, int64_t k_block_size) {
  constexpr const char* kOp = "estimate_grid";
  check_qk(kOp, q, k);
  check_grid_head_dim(kOp, "q", q);
  const GridSettings settings = check_settings(kOp, q, top_p, keep_sink, keep_recent, keep_above,
                                               scale, causal, q_block_size, k_block_size);
  if (q.is_cpu()) {
    const auto outputs = call_reference<2>(kOp, q, k, top_p, keep_sink, keep_recent, keep_above,
                                           std::optional<double>(settings.scale), causal,
                                           q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  EstimateGridParams params = {};
  params.k = view(k);
  return select_on_grid(kOp, "k", q, k.size(1), k.size(2), params, settings);
#else
  fail_without_cuda(kOp);
#endif
}

std::tuple<Tensor, Tensor> select_grid(const Tensor& q, const Tensor& k_cells,
                                       const Tensor& k_factors, int64_t k_len, double top_p,
                                       int64_t keep_sink, int64_t keep_recent,
                                       std::optional<double> keep_above,
                                       std::optional<double> scale, bool causal,
                                       int64_t q_block_size, int64_t k_block_size) {
  constexpr const char* kOp = "select_grid";
  check_activation(kOp, "q", q);
  check_grid_head_dim(kOp, "q", q);
  check_key_cells(kOp, {"k_cells", k_cells}, {"k_factors", k_factors}, "q", q, -1);
  check_gqa(kOp, "q", q.size(1), "k_cells", k_cells.size(1));
  PRISM_CHECK(k_len >= 0 && ceil_div(k_len, kCellTokens) <= k_cells.size(2), kOp, "k_len is ",
              k_len, "; allowed: 0 to the ", k_cells.size(2), " cells of k_cells times ",
              kCellTokens);
  const GridSettings settings = check_settings(kOp, q, top_p, keep_sink, keep_recent, keep_above,
                                               scale, causal, q_block_size, k_block_size);
  if (q.is_cpu()) {
    const auto outputs = call_reference<2>(kOp, q, k_cells, k_factors, k_len, top_p, keep_sink,
                                           keep_recent, keep_above,
                                           std::optional<double>(settings.scale), causal,
                                           q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  EstimateGridParams params = {};
  params.k_cells = cell_stats(k_cells, k_factors);
  return select_on_grid(kOp, "k_len", q, k_cells.size(1), k_len, params, settings);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
