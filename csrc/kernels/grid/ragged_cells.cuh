// Which tokens a cell of a ragged batch holds, and how they are read.
#pragma once

#include <cstdint>

#include "kernels/common/batch.cuh"
#include "kernels/common/load_rows.cuh"
#include "kernels/grid/workspace.h"

namespace prism {

struct RaggedCell {
  int sequence;
  int first_token;  // of the packed tensor; of the sequence where there are pages
  int tokens;       // 0: the cell belongs to no sequence
};

// Cell `place` of a head's. `longest`: tokens that a sequence has at most.
__device__ inline RaggedCell find_cell(const RaggedBatch& ragged, int batch, bool is_key,
                                       int longest, int64_t place) {
  int sequence = 0;
  int64_t first_cell = 0;
  Span span = {0, 0};
  if (is_key && ragged.is_paged()) {
    const int64_t cells = cells_of(longest);
    sequence = static_cast<int>(place / cells);
    first_cell = sequence * cells;
    span = k_span(ragged, sequence, longest);
  } else {
    const int32_t* starts = is_key ? ragged.cu_seqlens_k : ragged.cu_seqlens_q;
    int last = batch - 1;
#pragma unroll 1
    while (sequence < last) {
      const int middle = last - (last - sequence) / 2;
      if (first_packed_cell(__ldg(starts + middle), middle) <= place) {
        sequence = middle;
      } else {
        last = middle - 1;
      }
    }
    span = is_key ? k_span(ragged, sequence, longest) : q_span(ragged, sequence, longest);
    first_cell = first_packed_cell(span.start, sequence);
  }
  const int64_t offset = (place - first_cell) * kCellTokens;
  if (offset < 0 || offset >= span.length) {
    return {sequence, 0, 0};
  }
  const int token = static_cast<int>(offset);
  return {sequence, span.start + token, min(span.length - token, kCellTokens)};
}

// Rows of `x`, from `head` on; those behind the cell's last repeat it. Zeros for a cell of no
// sequence and for pages that the pool does not have.
template <Rows kRows, typename Element>
__device__ void load_cell(const RaggedBatch& ragged, const RaggedCell& cell, bool is_key,
                          const TensorView& x, const Element* head,
                          Pack<Element> (&packs)[kCellTokens]) {
  const bool paged = is_key && ragged.is_paged();
  const PagedTokens tokens(x, ragged, cell.sequence);
  if (paged && ragged.page_size() < kCellTokens && cell.tokens > 0) {
#pragma unroll
    for (int row = 0; row < kCellTokens; ++row) {
      const int key = cell.first_token + min(row, cell.tokens - 1);
      packs[row].raw = load_or_zeros<Element, kRows>(tokens.find(head, key)).raw;
    }
    return;
  }
  const Element* source = cell.tokens == 0 ? nullptr
                          : paged          ? tokens.find(head, cell.first_token)
                                           : head + cell.first_token * x.row_stride;
  if (source == nullptr) {
#pragma unroll
    for (int row = 0; row < kCellTokens; ++row) {
      packs[row].raw = {};
    }
    return;
  }
#pragma unroll
  for (int row = 0; row < kCellTokens; ++row) {
    packs[row].raw = load<Element, kRows>(source + min(row, cell.tokens - 1) * x.row_stride).raw;
  }
}

}  // namespace prism
