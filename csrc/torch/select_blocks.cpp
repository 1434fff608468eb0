#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <limits>

#include "kernels/attention/dispatch.h"
#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/reference.h"
#include "torch/selection.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/select/select_blocks.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "select_blocks";

void check_means(const char* name, const Tensor& means, const char* length_name, int64_t length,
                 const char* block_size_name, int64_t block_size) {
  check_defined(kOp, name, means);
  PRISM_CHECK(means.is_cpu() || means.is_cuda(), kOp, name,
              " is on an unsupported device; allowed: cpu, cuda");
  PRISM_CHECK(means.scalar_type() == ScalarType::Float, kOp, name, " has dtype ",
              torch::headeronly::toString(means.scalar_type()), "; expected Float (float32)");
  PRISM_CHECK(means.dim() == 4, kOp, name, " has shape ", shape_string(means),
              "; expected 4 dimensions: (batch, heads, blocks, head_dim)");
  PRISM_CHECK(head_dim_supported(means.size(3)), kOp, name, " has head_dim ", means.size(3),
              " (shape ", shape_string(means), "); allowed: multiples of 8 up to 256");
  PRISM_CHECK(means.stride(3) == 1 || means.numel() == 0, kOp, name, " has last stride ",
              means.stride(3), "; expected 1");
  PRISM_CHECK(length >= 0, kOp, length_name, " is ", length, "; allowed: 0 or more tokens");
  PRISM_CHECK(means.size(2) == ceil_div(length, block_size), kOp, name, " has ", means.size(2),
              " blocks; expected ceil(", length_name, " / ", block_size_name, ") = ceil(", length,
              " / ", block_size, ") = ", ceil_div(length, block_size));
}

#ifdef PRISM_WITH_CUDA
std::tuple<Tensor, Tensor> select_blocks_cuda(const Tensor& q_means, const Tensor& k_means,
                                              const SelectionSettings& settings) {
  const CudaContext context(kOp, q_means);
  const NvtxRange range("prism.select");
  Selection selection = make_selection(
      context, kOp, "k_means", q_means,
      {q_means.size(0), q_means.size(1), k_means.size(1), q_means.size(3)}, settings);
  selection.params.q_means = view(q_means);
  selection.params.k_means = view(k_means);
  context.check(launch_prepare_means(selection.params, context.stream()));
  context.check(launch_select_blocks(selection.params, context.sm(), context.stream()));
  return {selection.bits, selection.counts};
}
#endif

}  // namespace

#ifdef PRISM_WITH_CUDA
Selection make_selection(const CudaContext& context, const char* op, const char* keys,
                         const Tensor& like, const SelectionShape& shape,
                         const SelectionSettings& settings) {
  const auto [batch, q_heads, kv_heads, head_dim] = shape;
  const int64_t q_blocks = ceil_div(settings.q_len, settings.q_block_size);
  const int64_t k_blocks = ceil_div(settings.k_len, settings.k_block_size);
  PRISM_CHECK(k_blocks <= kMaxSelectKeyBlocks, op, keys, " has ", k_blocks,
              " blocks; allowed on cuda: at most ", kMaxSelectKeyBlocks);
  SelectBlocksParams params = {};
  params.batch = batch;
  params.q_heads = static_cast<int>(q_heads);
  params.kv_heads = static_cast<int>(kv_heads);
  params.q_len = settings.q_len;
  params.k_len = settings.k_len;
  params.q_blocks = q_blocks;
  params.k_blocks = k_blocks;
  params.head_dim = static_cast<int>(head_dim);
  params.q_block_size = static_cast<int>(settings.q_block_size);
  params.k_block_size = static_cast<int>(settings.k_block_size);
  params.high = settings.bands.high;
  params.low = settings.bands.low;
  params.top_p = settings.top_p;
  params.keep_above = settings.keep_above.value_or(std::numeric_limits<double>::infinity());
  params.keep_sink = settings.keep_sink;
  params.keep_recent = settings.keep_recent;
  params.causal = settings.causal;
  int64_t workspace_bytes = 0;
  context.check(select_workspace_bytes(params, &workspace_bytes));
  Selection selection{
      new_empty(like, {batch, q_heads, q_blocks, ceil_div(k_blocks, 32)}, ScalarType::Int),
      new_empty(like, {batch, q_heads, q_blocks}, ScalarType::Int),
      new_empty(like, {ceil_div(workspace_bytes, 4)}, ScalarType::Float), params};
  selection.params.workspace = selection.workspace.data_ptr();
  selection.params.bits = static_cast<uint32_t*>(selection.bits.data_ptr());
  selection.params.counts = static_cast<int32_t*>(selection.counts.data_ptr());
  return selection;
}
#endif

std::tuple<Tensor, Tensor> select_blocks(const Tensor& q_means, const Tensor& k_means,
                                         int64_t q_len, int64_t k_len,
                                         const std::vector<int64_t>& high_band,
                                         const std::vector<int64_t>& low_band, double top_p,
                                         int64_t keep_sink, int64_t keep_recent,
                                         std::optional<double> keep_above, bool causal,
                                         int64_t q_block_size, int64_t k_block_size) {
  check_block_sizes(kOp, q_block_size, k_block_size);
  check_means("q_means", q_means, "q_len", q_len, "q_block_size", q_block_size);
  check_means("k_means", k_means, "k_len", k_len, "k_block_size", k_block_size);
  check_same_device(kOp, "k_means", k_means, "q_means", q_means);
  PRISM_CHECK(k_means.size(0) == q_means.size(0), kOp, "k_means has batch size ", k_means.size(0),
              "; expected q_means', ", q_means.size(0));
  PRISM_CHECK(k_means.size(3) == q_means.size(3), kOp, "k_means has head_dim ", k_means.size(3),
              "; expected q_means', ", q_means.size(3));
  check_gqa(kOp, "q_means", q_means.size(1), "k_means", k_means.size(1));
  [[maybe_unused]] const SelectionBands bands = check_selection(
      kOp, high_band, low_band, q_means.size(3), top_p, keep_sink, keep_recent, keep_above);
  if (q_means.is_cpu()) {
    const auto outputs =
        call_reference<2>(kOp, q_means, k_means, q_len, k_len, high_band, low_band, top_p,
                          keep_sink, keep_recent, keep_above, causal, q_block_size, k_block_size);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  return select_blocks_cuda(q_means, k_means,
                            {q_len, k_len, bands, top_p, keep_sink, keep_recent, keep_above, causal,
                             q_block_size, k_block_size});
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
