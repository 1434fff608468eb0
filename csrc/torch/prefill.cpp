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

// One allocation: the tile counter, and what the selection asks for behind it.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes)
      : tensor_(new_workspace(like, kCounterBytes + bytes)),
        start_(static_cast<char*>(tensor_.data_ptr())) {}

  int32_t* counter() const { return reinterpret_cast<int32_t*>(start_); }
  void* selection() const { return start_ + kCounterBytes; }

 private:
  Tensor tensor_;  // kept until the launches; the allocator orders its reuse
  char* start_;
};

Workspace launch_selection(const CudaContext& context, const PrefillCall& call,
                           const SelectCall& select, const Mask& mask) {
  int64_t bytes = 0;
  if (call.estimator == Estimator::kAll) {
    Workspace workspace(call.on, bytes);
    KeepBlocksParams params;
    params.select = select_params(select, mask);
    params.window_left = window_of(call);
    context.check(launch_keep_blocks(params, context.stream()));
    return workspace;
  }
  if (call.estimator == Estimator::kBands) {
    BandsParams params =
        bands_params({select, call.bands, /*k_means=*/std::nullopt, call.scores.k_scale}, mask);
    context.check(bands_workspace_bytes(params, &bytes));
    Workspace workspace(call.on, bytes);
    params.select.workspace = workspace.selection();
    context.check(launch_select_bands(params, context.sm(), context.stream()));
    keep_short(context, params.select, call.dense_below);
    return workspace;
  }
  GridParams params = grid_params({select, call.scale, std::nullopt, std::nullopt}, mask);
  context.check(grid_workspace_bytes(params, &bytes));
  Workspace workspace(call.on, bytes);
  params.select.workspace = workspace.selection();
  context.check(launch_select_grid(params, context.sm(), context.stream()));
  keep_short(context, params.select, call.dense_below);
  return workspace;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const PrefillCall& call) {
  const CudaContext context(call.op, call.on);
  const NvtxRange range("prism.prefill");
  const SelectCall select{call.op,    call.on,     call.k,         call.shape,
                          call.rules, call.blocks, call.sequences, call.dense_below};
  if (call.estimator != Estimator::kAll) {
    check_key_blocks(select);
  }
  const Mask mask = new_mask(call.on, call.shape, call.blocks);
  Attention attention = new_attention(context, call, mask.bits, mask.counts);
  const Workspace workspace = launch_selection(context, call, select, mask);
  attention.params.tile_counter = workspace.counter();
  launch(context, call.op, attention.params);
  return {attention.out, attention.lse, mask.bits, mask.counts};
}

#endif

}  // namespace prism
