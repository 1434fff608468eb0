#include <torch/csrc/stable/ops.h>

#include "kernels/attention/dispatch.h"
#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/reference.h"
#include "torch/run_attention.h"

namespace prism {

namespace {

constexpr const char* kOp = "sparse_attention_varlen";

// What the arguments say about the batch, checked. What the device tensors contain is not looked
// at: the kernels hold it within the tensors.
struct Batch {
  int64_t size;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
};

void check_longest(const char* name, int64_t length) {
  PRISM_CHECK(length >= 0 && length <= kMaxSliceLength, kOp, name, " is ", length,
              "; allowed: 0 to ", kMaxSliceLength);
}

void check_total(const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.size(0) < kMaxSliceRows, kOp, name, " has ", tensor.size(0),
              " rows; allowed: less than ", kMaxSliceRows);
}

// An int32 vector beside q.
void check_lengths(const char* name, const Tensor& tensor, const Tensor& q, int64_t size,
                   const char* meaning) {
  check_same_device(kOp, name, tensor, "q", q);
  check_int_tensor(kOp, name, tensor, {size}, meaning);
}

void check_pages(const Tensor& q, const Tensor& k, const Tensor& block_table, const Batch& batch) {
  check_same_device(kOp, "block_table", block_table, "q", q);
  check_int32(kOp, "block_table", block_table);
  PRISM_CHECK(block_table.dim() == 2 && block_table.size(0) == batch.size, kOp,
              "block_table has shape ", shape_string(block_table), "; expected (", batch.size,
              ", any): (batch, pages of a sequence)");
  PRISM_CHECK(block_table.stride(1) == 1 || block_table.size(1) <= 1, kOp,
              "block_table has last stride ", block_table.stride(1), "; expected 1");
  const int64_t page_size = k.size(1);
  PRISM_CHECK(page_size >= 1 && page_size <= 256 && (page_size & (page_size - 1)) == 0, kOp,
              "k has page size ", page_size, " (shape ", shape_string(k),
              "); allowed: powers of two from 1 to 256");
  PRISM_CHECK(k.size(0) < kMaxSliceRows, kOp, "k has ", k.size(0), " pages; allowed: less than ",
              kMaxSliceRows);
  PRISM_CHECK(batch.max_seqlen_k <= block_table.size(1) * page_size, kOp, "max_seqlen_k is ",
              batch.max_seqlen_k, "; expected at most the ", block_table.size(1), " pages of ",
              page_size, " tokens that a row of block_table names");
}

Batch check_batch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                  const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
                  const std::optional<Tensor>& block_table, int64_t max_seqlen_q,
                  int64_t max_seqlen_k) {
  PRISM_CHECK(!block_table || !cu_seqlens_k, kOp,
              "cu_seqlens_k and block_table are both given; expected one of them");
  PRISM_CHECK(block_table || cu_seqlens_k, kOp,
              "cu_seqlens_k and block_table are None; expected one of them");
  const int64_t kv_dims = block_table ? 4 : 3;
  const char* kv_shape =
      block_table ? "(pages, page_size, kv_heads, head_dim)" : "(total_k, kv_heads, head_dim)";
  check_heads(kOp, "q", q, 3, "(total_q, q_heads, head_dim)");
  check_heads(kOp, "k", k, kv_dims, kv_shape);
  check_heads(kOp, "v", v, kv_dims, kv_shape);
  check_like_q(kOp, "k", k, q);
  check_like_q(kOp, "v", v, q);
  const auto k_sizes = k.sizes();
  check_shape(kOp, "v", v, {k_sizes.data(), k_sizes.data() + k_sizes.size()}, "k's shape");
  check_gqa(kOp, "q", q.size(1), "k", k.size(kv_dims - 2));
  check_total("q", q);

  check_same_device(kOp, "cu_seqlens_q", cu_seqlens_q, "q", q);
  PRISM_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1, kOp, "cu_seqlens_q has shape ",
              shape_string(cu_seqlens_q), "; expected (batch + 1)");
  const Batch batch{cu_seqlens_q.size(0) - 1,
                    q.size(1),
                    k.size(kv_dims - 2),
                    q.size(2),
                    max_seqlen_q,
                    max_seqlen_k};
  check_lengths("cu_seqlens_q", cu_seqlens_q, q, batch.size + 1, "(batch + 1)");
  check_longest("max_seqlen_q", max_seqlen_q);
  check_longest("max_seqlen_k", max_seqlen_k);
  if (seqused_k) {
    check_lengths("seqused_k", *seqused_k, q, batch.size, "one less than cu_seqlens_q");
  }
  if (block_table) {
    PRISM_CHECK(seqused_k, kOp, "seqused_k is None; expected the lengths of the paged sequences");
    check_pages(q, k, *block_table, batch);
  } else {
    check_lengths("cu_seqlens_k", *cu_seqlens_k, q, batch.size + 1, "as cu_seqlens_q");
    check_total("k", k);
  }
  return batch;
}

void check_mask(const Tensor& q, const Tensor& bits, const Tensor& counts, const Batch& batch,
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

#ifdef PRISM_WITH_CUDA

const int32_t* int_data(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.data_ptr());
}

RaggedBatch make_ragged(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                        const std::optional<Tensor>& cu_seqlens_k,
                        const std::optional<Tensor>& seqused_k,
                        const std::optional<Tensor>& block_table) {
  RaggedBatch ragged;
  ragged.cu_seqlens_q = int_data(cu_seqlens_q);
  ragged.seqused_k = seqused_k ? int_data(*seqused_k) : nullptr;
  ragged.total_q = static_cast<int>(q.size(0));
  if (block_table) {
    ragged.block_table = int_data(*block_table);
    ragged.table_stride = block_table->size(0) > 1 ? block_table->stride(0) : block_table->size(1);
    ragged.pages = static_cast<int>(k.size(0));
    while (ragged.page_size() < k.size(1)) {
      ++ragged.page_shift;
    }
  } else {
    ragged.cu_seqlens_k = int_data(*cu_seqlens_k);
    ragged.total_k = static_cast<int>(k.size(0));
  }
  return ragged;
}

#endif

}  // namespace

std::tuple<Tensor, Tensor> sparse_attention_varlen(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& counts,
    const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_k, const std::optional<Tensor>& block_table,
    int64_t max_seqlen_q, int64_t max_seqlen_k, std::optional<double> scale, bool causal,
    int64_t q_block_size, int64_t k_block_size, const std::optional<Tensor>& sinks,
    std::optional<double> softcap, std::optional<int64_t> window_left) {
  const Batch batch = check_batch(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
                                  max_seqlen_q, max_seqlen_k);
  check_block_sizes(kOp, q_block_size, k_block_size);
  check_mask(q, bits, counts, batch, q_block_size, k_block_size);
  check_sinks(kOp, sinks, q, batch.q_heads);
  const double softmax_scale = check_scale(kOp, scale, batch.head_dim);
  [[maybe_unused]] const ScoreOptions scores =
      check_scores(kOp, softcap, window_left, max_seqlen_k);
  if (q.is_cpu()) {
    const std::optional<double> resolved = softmax_scale;
    const auto outputs =
        call_reference<2>(kOp, q, k, v, bits, counts, cu_seqlens_q, cu_seqlens_k, seqused_k,
                          block_table, max_seqlen_q, max_seqlen_k, resolved, causal, q_block_size,
                          k_block_size, sinks, softcap, window_left);
    return {take_tensor(outputs[0]), take_tensor(outputs[1])};
  }
#ifdef PRISM_WITH_CUDA
  const CudaContext context(kOp, q);
  Tensor out = make_output(q);
  Tensor lse = new_empty(q, {batch.q_heads, q.size(0)}, ScalarType::Float);
  SparseAttentionParams params{};
  params.q = view(q, /*batch=*/-1, /*head=*/1, /*row=*/0);
  params.k = block_table ? view(k, 0, 2, 1) : view(k, -1, 1, 0);
  params.v = block_table ? view(v, 0, 2, 1) : view(v, -1, 1, 0);
  params.out = view(out, -1, 1, 0);
  params.lse = static_cast<float*>(lse.data_ptr());
  params.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  params.bits = static_cast<const uint32_t*>(bits.data_ptr());
  params.counts = int_data(counts);
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
  params.ragged = make_ragged(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table);
  run_attention(kOp, context, q, params);
  return {out, lse};
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
