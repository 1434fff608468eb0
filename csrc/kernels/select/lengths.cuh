// How long the sequences of a batch are.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Rows [start, start + length) of a packed tensor; of pages, `start` is 0.
struct Span {
  int start;
  int length;
};

namespace detail {

__device__ inline int clamp(int x, int low, int high) { return min(max(x, low), high); }

__device__ inline Span packed_span(const int32_t* cu_seqlens, int batch, int total, int longest) {
  const int start = clamp(__ldg(cu_seqlens + batch), 0, total);
  const int end = clamp(__ldg(cu_seqlens + batch + 1), start, total);
  return {start, min(end - start, longest)};
}

}  // namespace detail

// Of sequence `batch`, within the tensors whatever the lengths say.
__device__ inline Span q_span(const RaggedBatch& ragged, int batch, int longest) {
  return detail::packed_span(ragged.cu_seqlens_q, batch, ragged.total_q, longest);
}

__device__ inline Span k_span(const RaggedBatch& ragged, int batch, int longest) {
  Span span{0, ragged.pages > 0 ? longest : 0};
  if (!ragged.is_paged()) {
    span = detail::packed_span(ragged.cu_seqlens_k, batch, ragged.total_k, longest);
  }
  if (ragged.seqused_k != nullptr) {
    span.length = detail::clamp(__ldg(ragged.seqused_k + batch), 0, span.length);
  }
  return span;
}

// The page of key `key`; it is in the pool whatever the table says.
__device__ inline int page_of(const RaggedBatch& ragged, int batch, int key) {
  const int page =
      __ldg(ragged.block_table + batch * ragged.table_stride + (key >> ragged.page_shift));
  return detail::clamp(page, 0, ragged.pages - 1);
}

// Of one sequence, in tokens and in blocks.
struct Lengths {
  int q_len;
  int k_len;
  int q_blocks;
  int k_blocks;

  __device__ static Lengths longest(const SelectBlocksParams& params) {
    return {static_cast<int>(params.q_len), static_cast<int>(params.k_len),
            static_cast<int>(params.q_blocks), static_cast<int>(params.k_blocks)};
  }

  __device__ static Lengths of(const SelectBlocksParams& params, int batch) {
    Lengths lengths = longest(params);
    if (params.ragged.is_ragged()) {
      lengths.q_len = q_span(params.ragged, batch, lengths.q_len).length;
      lengths.k_len = k_span(params.ragged, batch, lengths.k_len).length;
      lengths.q_blocks = (lengths.q_len + params.q_block_size - 1) / params.q_block_size;
      lengths.k_blocks = (lengths.k_len + params.k_block_size - 1) / params.k_block_size;
    }
    return lengths;
  }
};

}  // namespace prism
