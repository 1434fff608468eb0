#include "torch/batch.h"

#include <cstdint>

#include "kernels/attention/dispatch.h"
#include "torch/cuda_context.h"

namespace prism {

namespace {

// k or v, which have device, dtype (but for fp8) and head_dim in common with q.
void check_like_q(const char* op, const char* name, const Tensor& tensor, const Tensor& q,
                  Fp8 fp8) {
  check_same_device(op, name, tensor, "q", q);
  const bool same = tensor.scalar_type() == q.scalar_type();
  PRISM_CHECK(same || (fp8 == Fp8::kAllowed && is_fp8(tensor)), op, name, " has dtype ",
              torch::headeronly::toString(tensor.scalar_type()), "; expected q's, ",
              torch::headeronly::toString(q.scalar_type()),
              fp8 == Fp8::kAllowed ? ", or Float8_e4m3fn" : "");
  const int64_t head_dim = tensor.size(tensor.dim() - 1);
  PRISM_CHECK(head_dim == q.size(q.dim() - 1), op, name, " has head_dim ", head_dim,
              "; expected q's, ", q.size(q.dim() - 1));
}

void check_like_k(const char* op, const Tensor& v, const Tensor& k) {
  PRISM_CHECK(v.scalar_type() == k.scalar_type(), op, "v has dtype ",
              torch::headeronly::toString(v.scalar_type()), "; expected k's, ",
              torch::headeronly::toString(k.scalar_type()));
  bool same = true;
  for (int64_t dim = 0; dim < k.dim(); ++dim) {
    same &= v.size(dim) == k.size(dim);
  }
  PRISM_CHECK(same, op, "v has shape ", shape_string(v), "; expected k's, ", shape_string(k));
}

void check_none(const char* op, const char* name, bool given) {
  PRISM_CHECK(!given, op, name,
              " is given without cu_seqlens_q; expected None for a dense batch, or cu_seqlens_q");
}

void check_is_dense(const char* op, const SequenceArguments& sequences) {
  check_none(op, "cu_seqlens_k", sequences.cu_seqlens_k.has_value());
  check_none(op, "seqused_k", sequences.seqused_k.has_value());
  check_none(op, "block_table", sequences.block_table.has_value());
  check_none(op, "max_seqlen_q", sequences.max_seqlen_q.has_value());
  check_none(op, "max_seqlen_k", sequences.max_seqlen_k.has_value());
}

void check_batch_size(const char* op, const char* name, const Tensor& tensor, const Tensor& q) {
  PRISM_CHECK(tensor.size(0) == q.size(0), op, name, " has batch size ", tensor.size(0),
              "; expected q's, ", q.size(0));
}

int64_t check_longest(const char* op, const char* name, std::optional<int64_t> length) {
  PRISM_CHECK(length, op, name, " is None; expected a number, as there is cu_seqlens_q");
  PRISM_CHECK(*length >= 0 && *length <= kMaxSliceLength, op, name, " is ", *length,
              "; allowed: 0 to ", kMaxSliceLength);
  return *length;
}

void check_total(const char* op, const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.size(0) < kMaxSliceRows, op, name, " has ", tensor.size(0),
              " rows; allowed: less than ", kMaxSliceRows);
}

void check_pages(const char* op, const Tensor& q, const Tensor& k, const Tensor& block_table,
                 const Shape& shape) {
  check_same_device(op, "block_table", block_table, "q", q);
  check_dtype(op, "block_table", block_table, ScalarType::Int, "Int (int32)");
  PRISM_CHECK(block_table.dim() == 2 && block_table.size(0) == shape.batch, op,
              "block_table has shape ", shape_string(block_table), "; expected (", shape.batch,
              ", any): (batch, pages of a sequence)");
  PRISM_CHECK(block_table.stride(1) == 1 || block_table.size(1) <= 1, op,
              "block_table has last stride ", block_table.stride(1), "; expected 1");
  const int64_t page_size = k.size(1);
  PRISM_CHECK(page_size >= 1 && page_size <= 256 && (page_size & (page_size - 1)) == 0, op,
              "k has page size ", page_size, " (shape ", shape_string(k),
              "); allowed: powers of two from 1 to 256");
  PRISM_CHECK(k.size(0) < kMaxSliceRows, op, "k has ", k.size(0), " pages; allowed: less than ",
              kMaxSliceRows);
  PRISM_CHECK(shape.k_len <= block_table.size(1) * page_size, op, "max_seqlen_k is ", shape.k_len,
              "; expected at most the ", block_table.size(1), " pages of ", page_size,
              " tokens that a row of block_table names");
}

Shape check_sequences(const char* op, const Tensor& q, const Tensor& k, int64_t kv_heads,
                      const SequenceArguments& sequences) {
  const auto& [cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_q, max_k] = sequences;
  check_total(op, "q", q);
  check_same_device(op, "cu_seqlens_q", *cu_seqlens_q, "q", q);
  PRISM_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) >= 1, op, "cu_seqlens_q has shape ",
              shape_string(*cu_seqlens_q), "; expected (batch + 1)");
  const int64_t ends = cu_seqlens_q->size(0);
  check_int_tensor(op, "cu_seqlens_q", *cu_seqlens_q, q, {ends}, "(batch + 1)");
  const Shape shape{/*ragged=*/true,
                    ends - 1,
                    q.size(1),
                    kv_heads,
                    q.size(2),
                    check_longest(op, "max_seqlen_q", max_q),
                    check_longest(op, "max_seqlen_k", max_k)};
  if (seqused_k) {
    check_int_tensor(op, "seqused_k", *seqused_k, q, {shape.batch}, "one less than cu_seqlens_q");
  }
  if (block_table) {
    PRISM_CHECK(seqused_k, op, "seqused_k is None; expected the lengths of the paged sequences");
    check_pages(op, q, k, *block_table, shape);
  } else {
    check_int_tensor(op, "cu_seqlens_k", *cu_seqlens_k, q, {ends}, "as cu_seqlens_q");
    check_total(op, "k", k);
  }
  return shape;
}

}  // namespace

Shape check_batch(const char* op, const Tensor& q, const Tensor& k, const Tensor* v,
                  const SequenceArguments& sequences, Fp8 fp8) {
  const bool paged = sequences.block_table.has_value();
  if (sequences.ragged()) {
    PRISM_CHECK(!paged || !sequences.cu_seqlens_k, op,
                "cu_seqlens_k and block_table are both given; expected one of them");
    PRISM_CHECK(paged || sequences.cu_seqlens_k, op,
                "cu_seqlens_k and block_table are None; expected one of them beside cu_seqlens_q");
    const int64_t kv_dims = paged ? 4 : 3;
    const char* kv_shape =
        paged ? "(pages, page_size, kv_heads, head_dim)" : "(total_k, kv_heads, head_dim)";
    check_heads(op, "q", q, 3, "(total_q, q_heads, head_dim)");
    check_heads(op, "k", k, kv_dims, kv_shape, fp8);
    if (v != nullptr) {
      check_heads(op, "v", *v, kv_dims, kv_shape, fp8);
    }
  } else {
    check_is_dense(op, sequences);
    check_activation(op, "q", q);
    check_activation(op, "k", k, fp8);
    if (v != nullptr) {
      check_activation(op, "v", *v, fp8);
    }
  }
  check_like_q(op, "k", k, q, fp8);
  if (!sequences.ragged()) {
    check_batch_size(op, "k", k, q);
  }
  if (v != nullptr) {
    check_like_q(op, "v", *v, q, fp8);
    if (!sequences.ragged()) {
      check_batch_size(op, "v", *v, q);
    }
    check_like_k(op, *v, k);
  }
  const int64_t kv_heads = k.size(sequences.ragged() ? k.dim() - 2 : 1);
  check_gqa(op, q.size(1), "k", kv_heads);
  if (sequences.ragged()) {
    return check_sequences(op, q, k, kv_heads, sequences);
  }
  return {/*ragged=*/false, q.size(0), q.size(1), kv_heads,
          q.size(3),        q.size(2), k.size(2)};
}

Shape check_pooled_batch(const char* op, const Tensor& q, const char* name, const Tensor& pooled,
                         std::optional<int64_t> k_len, const SequenceArguments& sequences) {
  PRISM_CHECK(!sequences.ragged(), op, name,
              " is given with cu_seqlens_q; expected k, whose sequences are pooled in the call");
  check_is_dense(op, sequences);
  check_activation(op, "q", q);
  check_same_device(op, name, pooled, "q", q);
  PRISM_CHECK(pooled.dim() == 4, op, name, " has shape ", shape_string(pooled),
              "; expected 4 dimensions");
  check_batch_size(op, name, pooled, q);
  check_gqa(op, q.size(1), name, pooled.size(1));
  PRISM_CHECK(k_len, op, "k_len is None; expected the number of keys that ", name, " pools");
  PRISM_CHECK(*k_len >= 0, op, "k_len is ", *k_len, "; allowed: 0 or more tokens");
  return {/*ragged=*/false, q.size(0), q.size(1), pooled.size(1),
          q.size(3),        q.size(2), *k_len};
}

void check_dense_below(const char* op, int64_t dense_below, const Shape& shape) {
  PRISM_CHECK(dense_below >= 0, op, "dense_below is ", dense_below, "; allowed: 0 or more keys");
  PRISM_CHECK(dense_below == 0 || shape.ragged, op, "dense_below is ", dense_below,
              " without cu_seqlens_q; expected 0 for a dense batch");
}

#ifdef PRISM_WITH_CUDA

namespace {

const int32_t* int_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int32_t*>(tensor->data_ptr()) : nullptr;
}

}  // namespace

RaggedBatch make_ragged(const Tensor& q, const Tensor& k, const SequenceArguments& sequences) {
  RaggedBatch ragged;
  if (!sequences.ragged()) {
    return ragged;
  }
  ragged.cu_seqlens_q = int_data(sequences.cu_seqlens_q);
  ragged.cu_seqlens_k = int_data(sequences.cu_seqlens_k);
  ragged.seqused_k = int_data(sequences.seqused_k);
  ragged.total_q = static_cast<int>(q.size(0));
  if (const auto& table = sequences.block_table) {
    // A table without entries has no address, and null would say that there are no pages. It is
    // never read: max_seqlen_k is 0.
    ragged.block_table = int_data(table->numel() > 0 ? table : sequences.cu_seqlens_q);
    ragged.table_stride = table->size(0) > 1 ? table->stride(0) : table->size(1);
    ragged.pages = static_cast<int>(k.size(0));
    while (ragged.page_size() < k.size(1)) {
      ++ragged.page_shift;
    }
  } else {
    ragged.total_k = static_cast<int>(k.size(0));
  }
  return ragged;
}

TensorView view(const Tensor& tensor, const Shape& shape) {
  if (!shape.ragged) {
    return view(tensor);
  }
  return tensor.dim() == 4 ? view(tensor, /*batch=*/0, /*head=*/2, /*row=*/1)
                           : view(tensor, /*batch=*/-1, /*head=*/1, /*row=*/0);
}

#endif

}  // namespace prism
