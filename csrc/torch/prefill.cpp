#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"

namespace prism {

// Estimate, then attend, with nothing read back in between. The arguments are checked here first
// so that a wrong call is refused under this op's name before the first launch.
std::tuple<Tensor, Tensor, Tensor, Tensor> prefill(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& high_band,
    const std::vector<int64_t>& low_band, double top_p, int64_t keep_sink, int64_t keep_recent,
    std::optional<double> keep_above, std::optional<double> scale, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  constexpr const char* kOp = "prefill";
  check_qkv(kOp, q, k, v);
  check_kv_scales(kOp, k, v, k.size(1), k_scale, v_scale);
  check_block_sizes(kOp, q_block_size, k_block_size);
  check_selection(kOp, high_band, low_band, q.size(3), top_p, keep_sink, keep_recent, keep_above);
  const double softmax_scale = check_scale(kOp, scale, q.size(3));
#ifdef PRISM_WITH_CUDA
  const NvtxRange range("prism.prefill");
#endif
  const auto [bits, counts] =
      estimate_blocks(q, k, high_band, low_band, top_p, keep_sink, keep_recent, keep_above, causal,
                      q_block_size, k_block_size, k_scale);
  const auto [out, lse] =
      sparse_attention(q, k, v, bits, counts, softmax_scale, causal, q_block_size, k_block_size,
                       /*sinks=*/std::nullopt, /*softcap=*/std::nullopt,
                       /*window_left=*/std::nullopt, k_scale, v_scale);
  return {out, lse, bits, counts};
}

}  // namespace prism
