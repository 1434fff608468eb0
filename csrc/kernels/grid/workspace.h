// What one estimation on the grid needs beside its inputs and outputs, in one allocation.
#pragma once

#include <cstdint>

#include "kernels/common/carver.h"
#include "kernels/params.h"

namespace prism {

constexpr int kGridWarps = 4;      // of a scoring CTA
constexpr int kCtaRows = 128;      // query cells that a CTA scores at a time
constexpr int kTileCells = 32;     // key cells that it scores them with at a time
constexpr int kSweepBlocks = 128;  // masses that a warp reads at a time

__host__ __device__ inline int64_t cells_of(int64_t tokens) {
  return (tokens + kCellTokens - 1) / kCellTokens;
}

// A ragged batch has one row of cells a head. Sequence `sequence`, whose tokens begin at token
// `start` of a packed tensor, has its cells from here on: each one before it fills all of them but
// one, for which there is room.
__host__ __device__ inline int64_t first_packed_cell(int64_t start, int64_t sequence) {
  return start / kCellTokens + sequence;
}

// Cells of keys that there is room for in a head of a ragged batch. In pages, sequences have equal
// room.
__host__ __device__ inline int64_t ragged_key_cells(const SelectParams& select) {
  return select.ragged.is_paged() ? select.batch * cells_of(select.k_len)
                                  : first_packed_cell(select.ragged.total_k, select.batch);
}

// `ctas` CTAs work at a time, each in a scratch of its own: memory grows with their number and
// with the length of a row, not with the number of rows.
struct GridWorkspace {
  // Of the queries, and of the keys unless they were pooled before. Vectors are scaled by a power
  // of two each, see pool_cells.cuh; a product of two times both factors is a base 2 logit.
  CellStats q;
  CellStats k;
  int* tile_counter;   // of a ragged batch: the next tile that a CTA draws; pooling sets it to 0
  float* scratch;      // (ctas, cta_floats())
  int64_t row_blocks;  // key blocks of a row, padded
  int64_t bytes;

  // `ragged` is what params.select.ragged says, known to kernels when they are compiled.
  __host__ __device__ GridWorkspace(const GridParams& params, int64_t ctas, bool ragged) {
    const SelectParams& select = params.select;
    row_blocks = (select.k_blocks + kSweepBlocks - 1) / kSweepBlocks * kSweepBlocks;
    Carver parts(select.workspace);
    const int64_t batch = ragged ? 1 : select.batch;
    const auto take_cells = [&](int64_t heads, int64_t cells) {
      const int64_t width = 2 * estimation_width(select.head_dim);
      CellStats stats;
      stats.vectors = parts.take<uint16_t>(batch * heads * cells * width);
      stats.factors = parts.take<float>(batch * heads * cells);
      stats.vector_batch_stride = heads * cells * width;
      stats.vector_head_stride = cells * width;
      stats.factor_batch_stride = heads * cells;
      stats.factor_head_stride = cells;
      return stats;
    };
    q = take_cells(select.q_heads, ragged ? first_packed_cell(select.ragged.total_q, select.batch)
                                          : cells_of(select.q_len));
    k = params.k_cells.vectors != nullptr
            ? params.k_cells
            : take_cells(select.kv_heads,
                         ragged ? ragged_key_cells(select) : cells_of(select.k_len));
    tile_counter = ragged ? parts.take<int>(1) : nullptr;
    scratch = parts.take<float>(ctas * cta_floats());
    bytes = parts.bytes();
  }

  // Base 2 logits (units, row_blocks, rows of a unit), then masses (kGridWarps, row_blocks).
  __host__ __device__ int64_t cta_floats() const { return (kCtaRows + kGridWarps) * row_blocks; }
};

}  // namespace prism
