#include "torch/ragged.h"

#include <cstdint>

#include "kernels/attention/dispatch.h"
#include "torch/cuda_context.h"

namespace prism {

namespace {

void check_longest(const char* op, const char* name, int64_t length) {
  PRISM_CHECK(length >= 0 && length <= kMaxSliceLength, op, name, " is ", length,
              "; allowed: 0 to ", kMaxSliceLength);
}

void check_total(const char* op, const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.size(0) < kMaxSliceRows, op, name, " has ", tensor.size(0),
              " rows; allowed: less than ", kMaxSliceRows);
}

// An int32 vector beside q.
void check_lengths(const char* op, const char* name, const Tensor& tensor, const Tensor& q,
                   int64_t size, const char* meaning) {
  check_same_device(op, name, tensor, "q", q);
  check_int_tensor(op, name, tensor, {size}, meaning);
}

void check_pages(const char* op, const Tensor& q, const Tensor& k, const Tensor& block_table,
                 const RaggedShape& batch) {
  check_same_device(op, "block_table", block_table, "q", q);
  check_int32(op, "block_table", block_table);
  PRISM_CHECK(block_table.dim() == 2 && block_table.size(0) == batch.size, op,
              "block_table has shape ", shape_string(block_table), "; expected (", batch.size,
              ", any): (batch, pages of a sequence)");
  PRISM_CHECK(block_table.stride(1) == 1 || block_table.size(1) <= 1, op,
              "block_table has last stride ", block_table.stride(1), "; expected 1");
  const int64_t page_size = k.size(1);
  PRISM_CHECK(page_size >= 1 && page_size <= 256 && (page_size & (page_size - 1)) == 0, op,
              "k has page size ", page_size, " (shape ", shape_string(k),
              "); allowed: powers of two from 1 to 256");
  PRISM_CHECK(k.size(0) < kMaxSliceRows, op, "k has ", k.size(0), " pages; allowed: less than ",
              kMaxSliceRows);
  PRISM_CHECK(batch.max_seqlen_k <= block_table.size(1) * page_size, op, "max_seqlen_k is ",
              batch.max_seqlen_k, "; expected at most the ", block_table.size(1), " pages of ",
              page_size, " tokens that a row of block_table names");
}

}  // namespace

RaggedShape check_ragged(const char* op, const Tensor& q, const Tensor& k, const Tensor* v,
                         const Tensor& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                         const std::optional<Tensor>& seqused_k,
                         const std::optional<Tensor>& block_table, int64_t max_seqlen_q,
                         int64_t max_seqlen_k, Fp8 fp8) {
  PRISM_CHECK(!block_table || !cu_seqlens_k, op,
              "cu_seqlens_k and block_table are both given; expected one of them");
  PRISM_CHECK(block_table || cu_seqlens_k, op,
              "cu_seqlens_k and block_table are None; expected one of them");
  const int64_t kv_dims = block_table ? 4 : 3;
  const char* kv_shape =
      block_table ? "(pages, page_size, kv_heads, head_dim)" : "(total_k, kv_heads, head_dim)";
  check_heads(op, "q", q, 3, "(total_q, q_heads, head_dim)");
  check_heads(op, "k", k, kv_dims, kv_shape, fp8);
  if (v != nullptr) {
    check_heads(op, "v", *v, kv_dims, kv_shape, fp8);
  }
  check_like_q(op, "k", k, q, fp8);
  if (v != nullptr) {
    check_like_q(op, "v", *v, q, fp8);
    check_v_dtype(op, k, *v);
    const auto k_sizes = k.sizes();
    check_shape(op, "v", *v, {k_sizes.data(), k_sizes.data() + k_sizes.size()}, "k's shape");
  }
  check_gqa(op, "q", q.size(1), "k", k.size(kv_dims - 2));
  check_total(op, "q", q);

  check_same_device(op, "cu_seqlens_q", cu_seqlens_q, "q", q);
  PRISM_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1, op, "cu_seqlens_q has shape ",
              shape_string(cu_seqlens_q), "; expected (batch + 1)");
  const RaggedShape batch{cu_seqlens_q.size(0) - 1,
                          q.size(1),
                          k.size(kv_dims - 2),
                          q.size(2),
                          max_seqlen_q,
                          max_seqlen_k};
  check_lengths(op, "cu_seqlens_q", cu_seqlens_q, q, batch.size + 1, "(batch + 1)");
  check_longest(op, "max_seqlen_q", max_seqlen_q);
  check_longest(op, "max_seqlen_k", max_seqlen_k);
  if (seqused_k) {
    check_lengths(op, "seqused_k", *seqused_k, q, batch.size, "one less than cu_seqlens_q");
  }
  if (block_table) {
    PRISM_CHECK(seqused_k, op, "seqused_k is None; expected the lengths of the paged sequences");
    check_pages(op, q, k, *block_table, batch);
  } else {
    check_lengths(op, "cu_seqlens_k", *cu_seqlens_k, q, batch.size + 1, "as cu_seqlens_q");
    check_total(op, "k", k);
  }
  return batch;
}

#ifdef PRISM_WITH_CUDA

namespace {

const int32_t* int_data(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.data_ptr());
}

}  // namespace

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

TensorView ragged_view(const Tensor& tensor) {
  return tensor.dim() == 4 ? view(tensor, /*batch=*/0, /*head=*/2, /*row=*/1)
                           : view(tensor, /*batch=*/-1, /*head=*/1, /*row=*/0);
}

#endif

}  // namespace prism
