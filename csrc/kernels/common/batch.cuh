// Where the sequences of a batch lie and how long they are. The device's lengths and pages have not
// been checked: whatever they say, nothing outside the tensors is touched.
#pragma once

#include <cstdint>

#include "kernels/common/warp.cuh"
#include "kernels/params.h"

namespace prism {

// Rows [start, start + length) of a packed tensor; of pages, `start` is 0.
struct Span {
  int start;
  int length;
};

__device__ inline int clamp(int x, int low, int high) { return max(low, min(x, high)); }

__device__ inline Span packed_span(const int32_t* cu_seqlens, int sequence, int total,
                                   int longest) {
  const int start = clamp(__ldg(cu_seqlens + sequence), 0, total);
  const int end = clamp(__ldg(cu_seqlens + sequence + 1), start, total);
  return {start, min(end - start, longest)};
}

__device__ inline Span q_span(const RaggedBatch& ragged, int sequence, int longest) {
  return packed_span(ragged.cu_seqlens_q, sequence, ragged.total_q, longest);
}

__device__ inline Span k_span(const RaggedBatch& ragged, int sequence, int longest) {
  Span span{0, longest};
  if (!ragged.is_paged()) {
    span = packed_span(ragged.cu_seqlens_k, sequence, ragged.total_k, longest);
  }
  if (ragged.seqused_k != nullptr) {
    span.length = clamp(__ldg(ragged.seqused_k + sequence), 0, span.length);
  }
  return span;
}

// Tokens of the pages of one sequence. A token whose page the pool does not have reads as zeros.
struct PagedTokens {
  const TensorView& pool;
  const RaggedBatch& ragged;
  const int32_t* pages;  // of the sequence

  __device__ PagedTokens(const TensorView& pool, const RaggedBatch& ragged, int sequence)
      : pool(pool), ragged(ragged), pages(ragged.block_table + sequence * ragged.table_stride) {}

  // The row of `token` among those of `head`; null: the pool does not have it.
  template <typename Element>
  __device__ const Element* find(const Element* head, int token) const {
    const int32_t page = __ldg(pages + (token >> ragged.page_shift));
    if (static_cast<uint32_t>(page) >= static_cast<uint32_t>(ragged.pages)) {
      return nullptr;
    }
    return head + page * pool.batch_stride + (token & (ragged.page_size() - 1)) * pool.row_stride;
  }
};

// Of one sequence, in tokens and in blocks.
struct Lengths {
  int q_len;
  int k_len;
  int q_blocks;
  int k_blocks;

  __device__ static Lengths longest(const SelectParams& params) {
    return {static_cast<int>(params.q_len), static_cast<int>(params.k_len),
            static_cast<int>(params.q_blocks), static_cast<int>(params.k_blocks)};
  }

  __device__ static Lengths of(const SelectParams& params, int sequence) {
    Lengths lengths = longest(params);
    if (params.ragged.is_ragged()) {
      lengths.q_len = q_span(params.ragged, sequence, lengths.q_len).length;
      lengths.k_len = k_span(params.ragged, sequence, lengths.k_len).length;
      lengths.q_blocks = (lengths.q_len + params.q_block_size - 1) / params.q_block_size;
      lengths.k_blocks = (lengths.k_len + params.k_block_size - 1) / params.k_block_size;
    }
    return lengths;
  }
};

// Finds the sequences of work items by ascending index: items of one sequence follow those of the
// one before. All lanes of a warp take part.
class SequenceSearch {
 public:
  // The sequence of item `index`, which becomes its number among the sequence's; `batch` if there
  // are fewer items. A sequence has items_of(sequence).
  template <typename ItemsOf>
  __device__ int find(int& index, int batch, ItemsOf items_of) {
    const int lane = lane_index();
    for (; first_ < batch; first_ += 32) {
      const int items = first_ + lane < batch ? items_of(first_ + lane) : 0;
      int end = items;  // of this lane's sequence, and of those before it
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, end, step);
        end += lane >= step ? before : 0;
      }
      const unsigned later = __ballot_sync(kAllLanes, end > index - items_);
      if (later != 0) {
        const int found = __ffs(static_cast<int>(later)) - 1;
        index -= items_ + __shfl_sync(kAllLanes, end - items, found);
        return first_ + found;
      }
      items_ += __shfl_sync(kAllLanes, end, 31);
    }
    return batch;
  }

 private:
  int first_ = 0;  // sequences that have no item at or after the last index
  int items_ = 0;  // theirs
};

}  // namespace prism
