#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/grid_selection.h"
#include "torch/ops.h"
#include "torch/ragged.h"
#include "torch/reference.h"

namespace prism {

namespace {
constexpr const char* kOp = "estimate_grid_varlen";
}

std::tuple<Tensor, Tensor> estimate_grid_varlen(
    const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double top_p, int64_t keep_sink, int64_t keep_recent, std::optional<double> keep_above,
    std::optional<double> scale, bool causal, int64_t q_block_size, int64_t k_block_size) {
  const RaggedShape batch =
      check_ragged(kOp, q, k, /*v=*/nullptr, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
                   max_seqlen_q, max_seqlen_k, Fp8::kRefused);
  check_grid_head_dim(kOp, "q", q);
  const GridSettings settings =
      check_grid_settings(kOp, batch.head_dim, top_p, keep_sink, keep_recent, keep_above, scale,
                          causal, q_block_size, k_block_size);
  if (q.is_cpu()) {
    const auto outputs = call_reference<2>(
        kOp, q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k,
        top_p, keep_sink, keep_recent, keep_above, std::optional<double>(settings.scale), causal,
        q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  EstimateGridParams params = {};
  params.q = ragged_view(q);
  params.k = ragged_view(k);
  params.select.ragged = make_ragged(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table);
  return select_on_grid(
      kOp, "max_seqlen_k", q,
      {batch.size, batch.q_heads, batch.kv_heads, max_seqlen_q, max_seqlen_k, batch.head_dim},
      params, settings);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
