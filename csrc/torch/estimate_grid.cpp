#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/grid_selection.h"
#include "torch/key_cells.h"
#include "torch/ops.h"
#include "torch/reference.h"

namespace prism {

namespace {

#ifdef PRISM_WITH_CUDA
GridSizes sizes_of(const Tensor& q, int64_t kv_heads, int64_t k_len) {
  return {q.size(0), q.size(1), kv_heads, q.size(2), k_len, q.size(3)};
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
  const GridSettings settings =
      check_grid_settings(kOp, q.size(3), top_p, keep_sink, keep_recent, keep_above, scale, causal,
                          q_block_size, k_block_size);
  if (q.is_cpu()) {
    const auto outputs = call_reference<2>(kOp, q, k, top_p, keep_sink, keep_recent, keep_above,
                                           std::optional<double>(settings.scale), causal,
                                           q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  EstimateGridParams params = {};
  params.q = view(q);
  params.k = view(k);
  return select_on_grid(kOp, "k", q, sizes_of(q, k.size(1), k.size(2)), params, settings);
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
  const GridSettings settings =
      check_grid_settings(kOp, q.size(3), top_p, keep_sink, keep_recent, keep_above, scale, causal,
                          q_block_size, k_block_size);
  if (q.is_cpu()) {
    const auto outputs = call_reference<2>(
        kOp, q, k_cells, k_factors, k_len, top_p, keep_sink, keep_recent, keep_above,
        std::optional<double>(settings.scale), causal, q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  EstimateGridParams params = {};
  params.q = view(q);
  params.k_cells = cell_stats(k_cells, k_factors);
  return select_on_grid(kOp, "k_len", q, sizes_of(q, k_cells.size(1), k_len), params, settings);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
