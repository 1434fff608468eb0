#include <cmath>
#include <cstdint>

#include "kernels/attention/dispatch.h"
#include "torch/launches.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/attention/sparse_attention.h"
#endif

namespace prism {

AttentionCall check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                              std::optional<double> scale, const BlockArguments& blocks,
                              const ScoreArguments& scores, const SequenceArguments& sequences) {
  const Shape shape = check_batch(op, q, k, &v, sequences, Fp8::kAllowed);
  if (scores.sinks) {
    check_same_device(op, "sinks", *scores.sinks, "q", q);
    check_dtype(op, "sinks", *scores.sinks, ScalarType::Float, "Float (float32)");
    check_shape(op, "sinks", *scores.sinks, {shape.q_heads}, "(q_heads)");
    check_contiguous(op, "sinks", *scores.sinks);
  }
  check_head_scale(op, "k_scale", scores.k_scale, "k", k, shape.kv_heads);
  check_head_scale(op, "v_scale", scores.v_scale, "v", v, shape.kv_heads);
  check_block_sizes(op, blocks);
  const double softmax_scale = check_scale(op, scale, shape.head_dim);
  // Within these no step of the kernels leaves float32's normal range.
  constexpr double kLeastCap = 0x1p-64;
  constexpr double kLargestCap = 0x1p64;
  PRISM_CHECK(!scores.softcap || (*scores.softcap >= kLeastCap && *scores.softcap <= kLargestCap),
              op, "softcap is ", *scores.softcap, "; allowed: None, or 2^-64 to 2^64");
  PRISM_CHECK(!scores.window_left || *scores.window_left >= 0, op, "window_left is ",
              *scores.window_left, "; allowed: None, or 0 and more keys");
  return {op, q, k, v, shape, softmax_scale, blocks, scores, sequences};
}

MaskedAttentionCall check_sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& bits, const Tensor& counts,
                                           std::optional<double> scale,
                                           const BlockArguments& blocks,
                                           const ScoreArguments& scores,
                                           const SequenceArguments& sequences) {
  constexpr const char* kOp = "sparse_attention";
  const AttentionCall call = check_attention(kOp, q, k, v, scale, blocks, scores, sequences);
  const Shape& shape = call.shape;
  const int64_t q_blocks = shape.q_blocks(blocks);
  check_int_tensor(kOp, "bits", bits, q,
                   {shape.batch, shape.q_heads, q_blocks, shape.words(blocks)},
                   shape.ragged ? "(batch, q_heads, blocks of max_seqlen_q, ceil(blocks of "
                                  "max_seqlen_k / 32))"
                                : "(batch, q_heads, q_blocks, ceil(k_blocks / 32))");
  check_int_tensor(
      kOp, "counts", counts, q, {shape.batch, shape.q_heads, q_blocks},
      shape.ragged ? "(batch, q_heads, blocks of max_seqlen_q)" : "(batch, q_heads, q_blocks)");
  return {call, bits, counts};
}

#ifdef PRISM_WITH_CUDA

Attention new_attention(const CudaContext& context, const AttentionCall& call, const Tensor& bits,
                        const Tensor& counts) {
  const Tensor& q = call.on;
  const Shape& shape = call.shape;
  const ScoreArguments& scores = call.scores;
  const Tensor out = new_output(q);
  const Tensor lse =
      shape.ragged ? new_empty(q, {shape.q_heads, q.size(0)}, ScalarType::Float)
                   : new_empty(q, {shape.batch, shape.q_heads, shape.q_len}, ScalarType::Float);
  SparseAttentionParams params{};
  params.q = view(q, shape);
  params.k = view(call.k, shape);
  params.v = view(call.v, shape);
  params.out = view(out, shape);
  params.lse = static_cast<float*>(lse.data_ptr());
  params.sinks = float_data(scores.sinks);
  params.bits = static_cast<const uint32_t*>(bits.data_ptr());
  params.counts = static_cast<const int32_t*>(counts.data_ptr());
  params.batch = shape.batch;
  params.q_heads = static_cast<int>(shape.q_heads);
  params.kv_heads = static_cast<int>(shape.kv_heads);
  params.q_len = static_cast<int>(shape.q_len);
  params.k_len = static_cast<int>(shape.k_len);
  params.head_dim = static_cast<int>(shape.head_dim);
  params.q_block_size = static_cast<int>(call.blocks.q_block_size);
  params.k_block_size = static_cast<int>(call.blocks.k_block_size);
  params.scale = static_cast<float>(call.scale);
  params.softcap = static_cast<float>(scores.softcap.value_or(0.0));
  params.window_left = window_of(call);
  params.causal = call.blocks.causal;
  params.dtype = kernel_dtype(q);
  params.kv_is_fp8 = is_fp8(call.k);
  params.k_scale = float_data(scores.k_scale);
  params.v_scale = float_data(scores.v_scale);
  params.ragged = make_ragged(q, call.k, call.sequences);
  const AttentionChoice choice = choose_attention_kernel(params, context.sm());
  PRISM_CHECK(choice.kernel != AttentionKernel::kUnsupported, call.op, choice.name);
  return {out, lse, params};
}

void launch(const CudaContext& context, const char* op, const SparseAttentionParams& params) {
  const cudaError_t error = launch_sparse_attention(params, context.sm(), context.stream());
  PRISM_CHECK(error != kTensorMapRefused, op,
              "the driver can not describe q, k, v or out to the tensor memory accelerator; row "
              "strides are ",
              params.q.row_stride, ", ", params.k.row_stride, ", ", params.v.row_stride, ", ",
              params.out.row_stride, " elements");
  context.check(error);
}

std::tuple<Tensor, Tensor> run(const MaskedAttentionCall& call) {
  const CudaContext context(call.op, call.on);
  const NvtxRange range("prism.attention");
  Attention attention = new_attention(context, call, call.bits, call.counts);
  const Tensor counter = new_workspace(call.on, kCounterBytes);
  attention.params.tile_counter = static_cast<int32_t*>(counter.data_ptr());
  launch(context, call.op, attention.params);
  return {attention.out, attention.lse};
}

#endif

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
