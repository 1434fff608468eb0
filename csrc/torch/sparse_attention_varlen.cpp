#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/ragged.h"
#include "torch/reference.h"
#include "torch/run_attention.h"

namespace prism {

namespace {

constexpr const char* kOp = "sparse_attention_varlen";

void check_mask(const Tensor& q, const Tensor& bits, const Tensor& counts, const RaggedShape& batch,
                int64_t q_block_size, int64_t k_block_size) {
  check_same_device(kOp, "bits", bits, "q", q);
  check_same_device(kOp, "counts", counts, "q", q);
  const int64_t q_blocks = ceil_div(batch.max_seqlen_q, q_block_size);
  const int64_t words = ceil_div(ceil_div(batch.max_seqlen_k, k_block_size), 32);
  check_int_tensor(kOp, "bits", bits, {batch.size, batch.q_heads, q_blocks, words},
                   "(batch, q_heads, blocks of max_seqlen_q, ceil(blocks of max_seqlen_k / 32))");
  check_int_tensor(kOp, "counts", counts, {batch.size, batch.q_heads, q_blocks},
                   "(batch, q_heads, blocks of max_seqlen_q)");
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_attention_varlen(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& counts,
    const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_k, const std::optional<Tensor>& block_table,
    int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> scale, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& sinks,
    std::optional<double> softcap, std::optional<int64_t> window_left,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const RaggedShape batch = check_ragged(kOp, q, k, &v, cu_seqlens_q, cu_seqlens_k, seqused_k,
                                         block_table, max_seqlen_q, max_seqlen_k, Fp8::kAllowed);
  check_block_sizes(kOp, q_block_size, k_block_size);
  check_mask(q, bits, counts, batch, q_block_size, k_block_size);
  check_sinks(kOp, sinks, q, batch.q_heads);
  check_kv_scales(kOp, k, v, batch.kv_heads, k_scale, v_scale);
  const double softmax_scale = check_scale(kOp, scale, batch.head_dim);
  [[maybe_unused]] const ScoreOptions scores =
      check_scores(kOp, softcap, window_left, max_seqlen_k);
  if (q.is_cpu()) {
    const std::optional<double> resolved = softmax_scale;
    const auto outputs =
        call_reference<2>(kOp, q, k, v, bits, counts, cu_seqlens_q, cu_seqlens_k, seqused_k,
                          block_table, max_seqlen_q, max_seqlen_k, resolved, causal, q_block_size,
                          k_block_size, sinks, softcap, window_left, k_scale, v_scale);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  const CudaContext context(kOp, q);
  Tensor out = make_output(q);
  Tensor lse = new_empty(q, {batch.q_heads, q.size(0)}, ScalarType::Float);
  SparseAttentionParams params{};
  params.q = ragged_view(q);
  params.k = ragged_view(k);
  params.v = ragged_view(v);
  params.out = ragged_view(out);
  params.lse = static_cast<float*>(lse.data_ptr());
  params.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  params.bits = static_cast<const uint32_t*>(bits.data_ptr());
  params.counts = static_cast<const int32_t*>(counts.data_ptr());
  params.batch = batch.size;
  params.q_heads = static_cast<int>(batch.q_heads);
  params.kv_heads = static_cast<int>(batch.kv_heads);
  params.q_len = static_cast<int>(max_seqlen_q);
  params.k_len = static_cast<int>(max_seqlen_k);
  params.head_dim = static_cast<int>(batch.head_dim);
  params.q_block_size = static_cast<int>(q_block_size);
  params.k_block_size = static_cast<int>(k_block_size);
  params.scale = static_cast<float>(softmax_scale);
  params.softcap = scores.softcap;
  params.window_left = scores.window_left;
  params.causal = causal;
  params.dtype = kernel_dtype(q);
  set_fp8(k, k_scale, v_scale, params);
  params.ragged = make_ragged(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table);
  run_attention(kOp, context, q, params);
  return {out, lse};
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
