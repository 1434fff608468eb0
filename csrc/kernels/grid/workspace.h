// What one estimation on the grid needs beside its inputs and outputs, in one allocation.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

constexpr int kGridWarps = 4;      // of a scoring CTA
constexpr int kCtaRows = 128;      // query cells that a CTA scores at a time
constexpr int kTileCells = 32;     // key cells that it scores them with at a time
constexpr int kSweepBlocks = 128;  // masses that a warp reads at a time

__host__ __device__ inline int64_t cells_of(int64_t tokens) {
  return (tokens + kCellTokens - 1) / kCellTokens;
}

// `ctas` CTAs work at a time, each in a scratch of its own: memory grows with their number and
// with the length of a row, not with the number of rows.
struct GridWorkspace {
  // Of the queries, and of the keys unless they were pooled before. Vectors are scaled by a power of
  // two each, see pool_cells.cuh; a product of two times both factors is a base 2 logit.
  CellStats q;
  CellStats k;
  float* scratch;      // (ctas, cta_floats())
  int64_t row_blocks;  // key blocks of a row, padded
  int64_t total_bytes;

  __host__ __device__ GridWorkspace(const EstimateGridParams& params, int64_t ctas) {
    const SelectBlocksParams& select = params.select;
    row_blocks = (select.k_blocks + kSweepBlocks - 1) / kSweepBlocks * kSweepBlocks;
    char* next = static_cast<char*>(select.workspace);
    const auto take = [&](int64_t bytes) {
      char* begin = next;
      next += (bytes + 127) / 128 * 128;
      return begin;
    };
    const auto take_cells = [&](int64_t heads, int64_t tokens) {
      const int64_t cells = cells_of(tokens);
      const int64_t width = 2 * estimation_width(select.head_dim);
      CellStats stats;
      stats.vectors = take(select.batch * heads * cells * width * 2);
      stats.factors = reinterpret_cast<float*>(take(select.batch * heads * cells * 4));
      stats.vector_batch_stride = heads * cells * width;
      stats.vector_head_stride = cells * width;
      stats.factor_batch_stride = heads * cells;
      stats.factor_head_stride = cells;
      return stats;
    };
    q = take_cells(select.q_heads, select.q_len);
    k = params.k_cells.vectors == nullptr ? take_cells(select.kv_heads, select.k_len)
                                          : params.k_cells;
    scratch = reinterpret_cast<float*>(take(ctas * cta_floats() * 4));
    total_bytes = next - static_cast<char*>(select.workspace);
  }

  // Base 2 logits (units, row_blocks, rows of a unit), then masses (kGridWarps, row_blocks).
  __host__ __device__ int64_t cta_floats() const { return (kCtaRows + kGridWarps) * row_blocks; }
};

}  // namespace prism
