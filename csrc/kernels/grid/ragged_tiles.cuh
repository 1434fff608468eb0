// The tiles of a ragged batch: which query blocks a CTA scores next.
#pragma once

#include <cstdint>

#include "kernels/common/batch.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/grid/workspace.h"

namespace prism {

// What bounds a tile's query and key cells.
struct GridExtent {
  int64_t q_len;  // tokens
  int64_t k_len;  // tokens
  int q_cells;
  int k_cells;
  int units;  // of a key head, see GridCta
};

// In shared memory: a CTA's registers are all taken.
struct GridTile {
  GridExtent extent;  // of the sequence; no units: there are no more tiles
  int batch;
  int kv_head;       // over the batch
  int first_q_cell;  // of the sequence, in a head's cells
  int first_k_cell;
  int first_unit;
  SequenceSearch search;

  __device__ Lengths lengths(const SelectParams& select) const {
    const int q_len = static_cast<int>(extent.q_len);
    const int k_len = static_cast<int>(extent.k_len);
    return {q_len, k_len, (q_len + select.q_block_size - 1) / select.q_block_size,
            (k_len + select.k_block_size - 1) / select.k_block_size};
  }
};

__device__ inline int units_of(const SelectParams& select, int q_len) {
  return select.q_heads / select.kv_heads *
         ((q_len + select.q_block_size - 1) / select.q_block_size);
}

// Draws the next tile, by one warp. Tiles of one sequence follow those of the one before; its last
// query blocks, which see most, come first.
__device__ inline void draw_tile(const SelectParams& select, int* counter, GridTile& tile) {
  const RaggedBatch& ragged = select.ragged;
  const int batch = static_cast<int>(select.batch);
  const int longest_q = static_cast<int>(select.q_len);
  const int cta_units = kCtaRows / (select.q_block_size / kCellTokens);
  const auto head_tiles = [&](int sequence) {
    return (units_of(select, q_span(ragged, sequence, longest_q).length) + cta_units - 1) /
           cta_units;
  };
  int index = lane_index() == 0 ? atomicAdd(counter, 1) : 0;
  index = __shfl_sync(kAllLanes, index, 0);
  SequenceSearch search = tile.search;
  const int sequence =
      search.find(index, batch, [&](int other) { return head_tiles(other) * select.kv_heads; });
  if (lane_index() == 0) {
    tile.search = search;
    tile.extent.units = 0;
    if (sequence < batch) {
      const Span q = q_span(ragged, sequence, longest_q);
      const Span k = k_span(ragged, sequence, static_cast<int>(select.k_len));
      tile.extent = {q.length, k.length, static_cast<int>(cells_of(q.length)),
                     static_cast<int>(cells_of(k.length)), units_of(select, q.length)};
      tile.batch = sequence;
      tile.kv_head = sequence * select.kv_heads + index % select.kv_heads;
      tile.first_q_cell = static_cast<int>(first_packed_cell(q.start, sequence));
      tile.first_k_cell =
          static_cast<int>(ragged.is_paged() ? sequence * cells_of(select.k_len)
                                             : first_packed_cell(k.start, sequence));
      tile.first_unit = (head_tiles(sequence) - 1 - index / select.kv_heads) * cta_units;
    }
  }
}

// Zeros the rows of query blocks past the sequences' ends, by all threads of all CTAs.
__device__ inline void clear_past_ends(const SelectParams& select) {
  const int64_t words = (select.k_blocks + 31) / 32;
#pragma unroll 1
  for (int64_t head = blockIdx.x; head < select.batch * select.q_heads; head += gridDim.x) {
    const int own = Lengths::of(select, static_cast<int>(head / select.q_heads)).q_blocks;
    const int64_t begin = head * select.q_blocks + own;
    const int64_t end = (head + 1) * select.q_blocks;
#pragma unroll 1
    for (int64_t i = begin * words + threadIdx.x; i < end * words; i += blockDim.x) {
      select.bits[i] = 0;
    }
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      select.counts[i] = 0;
    }
  }
}

}  // namespace prism
