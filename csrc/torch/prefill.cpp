// Estimate, then attend, with nothing read back in between.
#include <cstdint>

#include "torch/launches.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/bands/select_bands.h"
#include "kernels/grid/select_grid.h"
#include "kernels/keep/keep_blocks.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "prefill";

Estimator check_estimator(const std::string& name) {
  if (name == "grid") {
    return Estimator::kGrid;
  }
  if (name == "bands") {
    return Estimator::kBands;
  }
  PRISM_CHECK(name == "all", kOp, "estimator is '", name, "'; allowed: 'grid', 'bands', 'all'");
  return Estimator::kAll;
}

}  // namespace

PrefillCall check_prefill(const Tensor& q, const Tensor& k, const Tensor& v,
                          const std::string& estimator, const BandArguments& bands,
                          const RuleArguments& rules, std::optional<double> scale,
                          const BlockArguments& blocks, const ScoreArguments& scores,
                          const SequenceArguments& sequences, int64_t dense_below) {
  const AttentionCall call = check_attention(kOp, q, k, v, scale, blocks, scores, sequences);
  const Shape& shape = call.shape;
  const Estimator checked = check_estimator(estimator);
  if (checked == Estimator::kGrid) {
    PRISM_CHECK(!is_fp8(k), kOp, "k has dtype Float8_e4m3fn; estimator 'grid' expects q's dtype");
    check_grid_head_dim(kOp, "q", q);
  }
  SelectionBands dimensions;
  if (checked == Estimator::kBands) {
    dimensions = check_bands(kOp, bands, shape.head_dim);
  } else {
    PRISM_CHECK(bands.high.empty(), kOp, "high_band names dimensions; expected [] with estimator '",
                estimator, "'");
    PRISM_CHECK(bands.low.empty(), kOp, "low_band names dimensions; expected [] with estimator '",
                estimator, "'");
  }
  const KeepRules keep = check_rules(kOp, rules, shape.q_heads);
  check_dense_below(kOp, dense_below, shape);
  return {call, checked, keep, dimensions, dense_below};
}

#ifdef PRISM_WITH_CUDA

namespace {

// Returns a workspace whose first bytes are the tile counter of attention, cleared ahead of the
// selection so that nothing comes between that and attention.
Tensor launch_selection(const CudaContext& context, const PrefillCall& call,
                        const SelectCall& selection, const Mask& mask) {
  if (call.estimator == Estimator::kBands) {
    return select(context, BandsCall{selection, call.bands, std::nullopt, call.scores.k_scale},
                  mask, Counter::kCleared);
  }
  if (call.estimator == Estimator::kGrid) {
    return select(context, GridCall{selection, call.scale, std::nullopt, std::nullopt}, mask,
                  Counter::kCleared);
  }
  KeepBlocksParams params;
  params.select = select_params(selection, mask);
  params.window_left = window_of(call);
  const Tensor workspace = new_workspace(context, call.on, /*bytes=*/0, Counter::kCleared);
  context.check(launch_keep_blocks(params, context.stream()));
  return workspace;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const PrefillCall& call) {
  const CudaContext context(call.op, call.on);
  const NvtxRange range("prism.prefill");
  const SelectCall selection{call.op,    call.on,     call.k,         call.shape,
                             call.rules, call.blocks, call.sequences, call.dense_below};
  if (call.estimator != Estimator::kAll) {
    check_key_blocks(selection);
  }
  const Mask mask = new_mask(call.on, call.shape, call.blocks);
  Attention attention = new_attention(context, call, mask.bits, mask.counts);
  const Tensor workspace = launch_selection(context, call, selection, mask);
  attention.params.tile_counter = static_cast<int32_t*>(workspace.data_ptr());
  // Nothing lies between the two, and each kernel of the selection waits for the one before it.
  attention.params.tile_counter_is_zero = true;
  attention.params.overlaps = true;
  launch(context, call.op, attention.params);
  return {attention.out, attention.lse, mask.bits, mask.counts};
}

#endif

}  // namespace prism
