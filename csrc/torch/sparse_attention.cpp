#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "kernels/attention/dispatch.h"
#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/reference.h"
#include "torch/run_attention.h"

namespace prism {

namespace {

constexpr const char* kOp = "sparse_attention";

}  // namespace

#ifdef PRISM_WITH_CUDA

Tensor make_output(const Tensor& q) {
  Tensor out = new_empty_like(q);
  if (out.stride(out.dim() - 1) != 1) {  // an overlapping q can have another dimension innermost
    const auto sizes = q.sizes();
    out = torch::stable::new_empty(q, {sizes.data(), sizes.size()}, q.scalar_type());
  }
  return out;
}

void set_fp8(const Tensor& k, const std::optional<Tensor>& k_scale,
             const std::optional<Tensor>& v_scale, SparseAttentionParams& params) {
  params.kv_is_fp8 = is_fp8(k);
  params.k_scale = k_scale ? static_cast<const float*>(k_scale->data_ptr()) : nullptr;
  params.v_scale = v_scale ? static_cast<const float*>(v_scale->data_ptr()) : nullptr;
}

void run_attention(const char* op, const CudaContext& context, const Tensor& q,
                   SparseAttentionParams& params) {
  const NvtxRange range("prism.attention");
  const AttentionChoice choice = choose_attention_kernel(params, context.sm());
  PRISM_CHECK(choice.kernel != AttentionKernel::kUnsupported, op, choice.name);
  std::optional<Tensor> tile_counter;  // kept until the launch; the allocator orders its reuse
  if (choice.kernel == AttentionKernel::kSm90) {
    tile_counter = new_empty(q, {1}, ScalarType::Int);
    params.tile_counter = static_cast<int32_t*>(tile_counter->data_ptr());
  }
  const cudaError_t error = launch_sparse_attention(params, context.sm(), context.stream());
  PRISM_CHECK(error != kTensorMapRefused, op,
              "the driver can not describe q, k, v or out to the tensor memory accelerator; row "
              "strides are ",
              params.q.row_stride, ", ", params.k.row_stride, ", ", params.v.row_stride, ", ",
              params.out.row_stride, " elements");
  context.check(error);
}

namespace {

std::tuple<Tensor, Tensor> sparse_attention_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& counts,
    double scale, bool causal, int64_t q_block_size, int64_t k_block_size,
    const std::optional<Tensor>& sinks, const ScoreOptions& scores,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const CudaContext context(kOp, q);
  Tensor out = make_output(q);
  Tensor lse = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  SparseAttentionParams params{};
  params.q = view(q);
  params.k = view(k);
  params.v = view(v);
  params.out = view(out);
  params.lse = static_cast<float*>(lse.data_ptr());
  params.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  params.bits = static_cast<const uint32_t*>(bits.data_ptr());
  params.counts = static_cast<const int32_t*>(counts.data_ptr());
  params.batch = q.size(0);
  params.q_heads = static_cast<int>(q.size(1));
  params.kv_heads = static_cast<int>(k.size(1));
  params.q_len = static_cast<int>(q.size(2));
  params.k_len = static_cast<int>(k.size(2));
  params.head_dim = static_cast<int>(q.size(3));
  params.q_block_size = static_cast<int>(q_block_size);
  params.k_block_size = static_cast<int>(k_block_size);
  params.scale = static_cast<float>(scale);
  params.softcap = scores.softcap;
  params.window_left = scores.window_left;
  params.causal = causal;
  params.dtype = kernel_dtype(q);
  set_fp8(k, k_scale, v_scale, params);
  run_attention(kOp, context, q, params);
  return {out, lse};
}

}  // namespace

#endif

std::tuple<Tensor, Tensor> sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& counts,
    std::optional<double> scale, bool causal, int64_t q_block_size, int64_t k_block_size,
    const std::optional<Tensor>& sinks, std::optional<double> softcap,
    std::optional<int64_t> window_left, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  check_qkv(kOp, q, k, v);
  check_block_sizes(kOp, q_block_size, k_block_size);
  check_same_device(kOp, "bits", bits, "q", q);
  check_same_device(kOp, "counts", counts, "q", q);
  const int64_t q_blocks = ceil_div(q.size(2), q_block_size);
  const int64_t words = ceil_div(ceil_div(k.size(2), k_block_size), 32);
  check_int_tensor(kOp, "bits", bits, {q.size(0), q.size(1), q_blocks, words},
                   "(batch, q_heads, q_blocks, ceil(k_blocks / 32))");
  check_int_tensor(kOp, "counts", counts, {q.size(0), q.size(1), q_blocks},
                   "(batch, q_heads, q_blocks)");
  check_sinks(kOp, sinks, q, q.size(1));
  check_kv_scales(kOp, k, v, k.size(1), k_scale, v_scale);
  const double softmax_scale = check_scale(kOp, scale, q.size(3));
  [[maybe_unused]] const ScoreOptions scores = check_scores(kOp, softcap, window_left, k.size(2));
  if (q.is_cpu()) {
    const std::optional<double> resolved = softmax_scale;
    const auto outputs =
        call_reference<2>(kOp, q, k, v, bits, counts, resolved, causal, q_block_size, k_block_size,
                          sinks, softcap, window_left, k_scale, v_scale);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  return sparse_attention_cuda(q, k, v, bits, counts, softmax_scale, causal, q_block_size,
                               k_block_size, sinks, scores, k_scale, v_scale);
#else
  fail_without_cuda(kOp);
#endif
}

std::string attention_kernel(int64_t sm, ScalarType dtype, int64_t head_dim, int64_t q_block_size,
                             int64_t k_block_size, bool fp8, bool score_options) {
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    return "unsupported: dtype must be BFloat16 or Half";
  }
#ifdef PRISM_WITH_CUDA
  const bool has_sm90 = may_use_sm90_kernels();
#else
  const bool has_sm90 = false;
#endif
  AttentionTraits traits{static_cast<int>(sm), head_dim, q_block_size,
                         k_block_size,         has_sm90, /*tma=*/true};
  traits.fp8 = fp8;
  traits.score_options = score_options;
  return choose_attention_kernel(traits).name;
}

}  // namespace prism
