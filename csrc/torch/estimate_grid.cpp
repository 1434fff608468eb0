#include <torch/csrc/stable/ops.h>

#include <limits>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/reference.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/grid/estimate_grid.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "estimate_grid";

#ifdef PRISM_WITH_CUDA
std::tuple<Tensor, Tensor> estimate_grid_cuda(const Tensor& q, const Tensor& k, double top_p,
                                              int64_t keep_sink, int64_t keep_recent,
                                              std::optional<double> keep_above, double scale,
                                              bool causal, int64_t q_block_size,
                                              int64_t k_block_size) {
  const CudaContext context(kOp, q);
  const NvtxRange range("prism.estimate");
  EstimateGridParams params = {};
  params.q = view(q);
  params.k = view(k);
  params.scale = static_cast<float>(scale);
  params.dtype = kernel_dtype(q);
  SelectBlocksParams& select = params.select;
  select.batch = q.size(0);
  select.q_heads = static_cast<int>(q.size(1));
  select.kv_heads = static_cast<int>(k.size(1));
  select.q_len = q.size(2);
  select.k_len = k.size(2);
  select.q_blocks = ceil_div(q.size(2), q_block_size);
  select.k_blocks = ceil_div(k.size(2), k_block_size);
  select.head_dim = static_cast<int>(q.size(3));
  select.q_block_size = static_cast<int>(q_block_size);
  select.k_block_size = static_cast<int>(k_block_size);
  select.top_p = top_p;
  select.keep_above = keep_above.value_or(std::numeric_limits<double>::infinity());
  select.keep_sink = keep_sink;
  select.keep_recent = keep_recent;
  select.causal = causal;
  PRISM_CHECK(select.k_blocks <= kMaxSelectKeyBlocks, kOp, "k has ", select.k_blocks,
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
  check_qk(kOp, q, k);
  check_grid_head_dim(kOp, "q", q);
  check_block_sizes(kOp, q_block_size, k_block_size);
  check_rules(kOp, top_p, keep_sink, keep_recent, keep_above);
  const double softmax_scale = check_scale(kOp, scale, q.size(3));
  if (q.is_cpu()) {
    const auto outputs =
        call_reference<2>(kOp, q, k, top_p, keep_sink, keep_recent, keep_above,
                          std::optional<double>(softmax_scale), causal, q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  return estimate_grid_cuda(q, k, top_p, keep_sink, keep_recent, keep_above, softmax_scale, causal,
                            q_block_size, k_block_size);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
