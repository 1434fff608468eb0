#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/selection.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/pool/block_pool.h"
#include "kernels/select/select_blocks.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "estimate_blocks";

#ifdef PRISM_WITH_CUDA
// Two launches: one that pools q and k, and the selection, which starts while the first ends.
std::tuple<Tensor, Tensor> estimate_blocks_cuda(const Tensor& q, const Tensor& k,
                                                const SelectionSettings& settings,
                                                const std::optional<Tensor>& k_scale) {
  const CudaContext context(kOp, q);
  const NvtxRange range("prism.estimate");
  Selection selection =
      make_selection(context, kOp, "k", q, {q.size(0), q.size(1), k.size(1), q.size(3)}, settings);
  const Tensor q_means =
      new_empty(q, {q.size(0), q.size(1), ceil_div(q.size(2), settings.q_block_size), q.size(3)},
                ScalarType::Float);
  selection.params.q_means = view(q_means);
  EstimatePoolParams params;
  params.q = view(q);
  params.k = view(k);
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

std::tuple<Tensor, Tensor> estimate_blocks(const Tensor& q, const Tensor& k,
                                           const std::vector<int64_t>& high_band,
                                           const std::vector<int64_t>& low_band, double top_p,
                                           int64_t keep_sink, int64_t keep_recent,
                                           std::optional<double> keep_above, bool causal,
                                           int64_t q_block_size, int64_t k_block_size,
                                           const std::optional<Tensor>& k_scale) {
  check_qk(kOp, q, k, Fp8::kAllowed);
  check_head_scale(kOp, "k_scale", k_scale, "k", k, k.size(1));
  check_block_sizes(kOp, q_block_size, k_block_size);
  [[maybe_unused]] const SelectionBands bands = check_selection(
      kOp, high_band, low_band, q.size(3), top_p, keep_sink, keep_recent, keep_above);
  if (q.is_cpu()) {
    return select_blocks(block_pool(q, q_block_size, std::nullopt),
                         block_pool(k, k_block_size, k_scale), q.size(2), k.size(2), high_band,
                         low_band, top_p, keep_sink, keep_recent, keep_above, causal, q_block_size,
                         k_block_size);
  }
#ifdef PRISM_WITH_CUDA
  return estimate_blocks_cuda(q, k,
                              {q.size(2), k.size(2), bands, top_p, keep_sink, keep_recent,
                               keep_above, causal, q_block_size, k_block_size},
                              k_scale);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
