#include <cstdint>

#include "torch/launches.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/bands/select_bands.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "select_bands";

// Float32 (batch, kv_heads, k_blocks or more, head_dim) with unit last stride.
void check_means(const Tensor& means, const Shape& shape, const BlockArguments& blocks) {
  check_dtype(kOp, "k_means", means, ScalarType::Float, "Float (float32)");
  PRISM_CHECK(means.size(3) == shape.head_dim, kOp, "k_means has head_dim ", means.size(3),
              "; expected q's, ", shape.head_dim);
  PRISM_CHECK(means.stride(3) == 1 || means.numel() == 0, kOp, "k_means has last stride ",
              means.stride(3), "; expected 1");
  PRISM_CHECK(means.size(2) >= shape.k_blocks(blocks), kOp, "k_means has ", means.size(2),
              " blocks; expected at least ceil(k_len / k_block_size) = ceil(", shape.k_len, " / ",
              blocks.k_block_size, ") = ", shape.k_blocks(blocks));
}

}  // namespace

BandsCall check_select_bands(const Tensor& q, const std::optional<Tensor>& k,
                             const BandArguments& bands, const RuleArguments& rules,
                             const BlockArguments& blocks, const KeyMeansArguments& pooled,
                             const std::optional<Tensor>& k_scale,
                             const SequenceArguments& sequences, int64_t dense_below) {
  const auto& [k_means, k_len] = pooled;
  PRISM_CHECK(k || k_means, kOp, "k and k_means are None; expected one of them");
  PRISM_CHECK(!k || !k_means, kOp, "k and k_means are both given; expected one of them");
  PRISM_CHECK(!k || !k_len, kOp, "k_len is given with k; expected None, or k_means");
  const Shape shape = k ? check_batch(kOp, q, *k, /*v=*/nullptr, sequences, Fp8::kAllowed)
                        : check_pooled_batch(kOp, q, "k_means", *k_means, k_len, sequences);
  PRISM_CHECK(k || !k_scale, kOp, "k_scale is given with k_means; expected None, or k");
  if (k) {
    check_head_scale(kOp, "k_scale", k_scale, "k", *k, shape.kv_heads);
  }
  check_block_sizes(kOp, blocks);
  if (k_means) {
    check_means(*k_means, shape, blocks);
  }
  const SelectionBands checked = check_bands(kOp, bands, shape.head_dim);
  const KeepRules keep = check_rules(kOp, rules, shape.q_heads);
  check_dense_below(kOp, dense_below, shape);
  return {{kOp, q, k, shape, keep, blocks, sequences, dense_below}, checked, k_means, k_scale};
}

#ifdef PRISM_WITH_CUDA

Tensor select(const CudaContext& context, const BandsCall& call, const Mask& mask) {
  BandsParams params = {};
  params.q = view(call.on, call.shape);
  if (call.k) {
    params.k = view(*call.k, call.shape);
    params.k_is_fp8 = is_fp8(*call.k);
  } else {
    params.k_means = view(*call.k_means);
  }
  params.select = select_params(call, mask);
  params.high = call.bands.high;
  params.low = call.bands.low;
  params.dtype = kernel_dtype(call.on);
  params.k_scale = float_data(call.k_scale);
  int64_t bytes = 0;
  context.check(bands_workspace_bytes(params, &bytes));
  const Tensor workspace = new_counted_workspace(call.on, bytes);
  params.select.workspace = static_cast<char*>(workspace.data_ptr()) + kCounterBytes;
  context.check(launch_select_bands(params, context.sm(), context.stream()));
  keep_short(context, params.select, call.dense_below);
  return workspace;
}

std::tuple<Tensor, Tensor> run(const BandsCall& call) {
  const CudaContext context(call.op, call.on);
  const NvtxRange range("prism.select");
  check_key_blocks(call);
  const Mask mask = new_mask(call.on, call.shape, call.blocks);
  select(context, call, mask);
  return {mask.bits, mask.counts};
}

#endif

}  // namespace prism
