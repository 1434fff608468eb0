#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/ragged.h"
#include "torch/reference.h"
#include "torch/selection.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/pool/block_pool.h"
#include "kernels/select/select_blocks.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "estimate_blocks_varlen";

#ifdef PRISM_WITH_CUDA
// As estimate_blocks, with lengths and pages that only the kernels read.
std::tuple<Tensor, Tensor> estimate_blocks_varlen_cuda(const Tensor& q, const Tensor& k,
                                                       const RaggedShape& batch,
                                                       const RaggedBatch& ragged,
                                                       const SelectionSettings& settings,
                                                       const std::optional<Tensor>& k_scale) {
  const CudaContext context(kOp, q);
  const NvtxRange range("prism.estimate");
  Selection selection =
      make_selection(context, kOp, "max_seqlen_k", q,
                     {batch.size, batch.q_heads, batch.kv_heads, batch.head_dim}, settings);
  const Tensor q_means = new_empty(
      q, {batch.size, batch.q_heads, selection.params.q_blocks, batch.head_dim}, ScalarType::Float);
  selection.params.q_means = view(q_means);
  selection.params.ragged = ragged;
  EstimatePoolParams params;
  params.q = ragged_view(q);
  params.k = ragged_view(k);
  params.select = selection.params;
  params.dtype = kernel_dtype(q);
  params.k_is_fp8 = is_fp8(k);
  params.k_scale = k_scale ? static_cast<const float*>(k_scale->data_ptr()) : nullptr;
  context.check(launch_estimate_pool(params, context.stream()));
  context.check(launch_select_blocks(selection.params, context.sm(), context.stream()));
  return {selection.bits, selection.counts};
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> estimate_blocks_varlen(
    const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const std::vector<int64_t>& high_band, const std::vector<int64_t>& low_band, double top_p,
    int64_t keep_sink, int64_t keep_recent, std::optional<double> keep_above, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& k_scale) {
  const RaggedShape batch =
      check_ragged(kOp, q, k, /*v=*/nullptr, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
                   max_seqlen_q, max_seqlen_k, Fp8::kAllowed);
  check_head_scale(kOp, "k_scale", k_scale, "k", k, batch.kv_heads);
  check_block_sizes(kOp, q_block_size, k_block_size);
  [[maybe_unused]] const SelectionBands bands = check_selection(
      kOp, high_band, low_band, batch.head_dim, top_p, keep_sink, keep_recent, keep_above);
  if (q.is_cpu()) {
    const auto outputs =
        call_reference<2>(kOp, q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
                          max_seqlen_q, max_seqlen_k, high_band, low_band, top_p, keep_sink,
                          keep_recent, keep_above, causal, q_block_size, k_block_size, k_scale);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  return estimate_blocks_varlen_cuda(
      q, k, batch, make_ragged(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table),
      {max_seqlen_q, max_seqlen_k, bands, top_p, keep_sink, keep_recent, keep_above, causal,
       q_block_size, k_block_size},
      k_scale);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
