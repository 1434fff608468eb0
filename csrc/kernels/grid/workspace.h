// What one estimation on the grid needs beside its inputs and outputs, in one allocation.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

constexpr int kCellTokens = 16;    // queries, or keys, of a cell
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
  // (batch, q_heads, q_cells, 2 width) and (batch, kv_heads, k_cells, 2 width), of a width of
  // estimation_width(head_dim): float16 statistics of the cells, scaled by a power of two each, see
  // pool_cells.cuh.
  uint4* q_cells;
  uint4* k_cells;
  // (batch, q_heads, q_cells) and (batch, kv_heads, k_cells): a product of statistics times both
  // factors is a base 2 logit.
  float* q_factors;
  float* k_factors;
  float* scratch;      // (ctas, cta_floats())
  int64_t row_blocks;  // key blocks of a row, padded
  int64_t total_bytes;

  __host__ __device__ GridWorkspace(const EstimateGridParams& params, int64_t ctas) {
    const SelectBlocksParams& select = params.select;
    const int64_t q_count = select.batch * select.q_heads * cells_of(select.q_len);
    const int64_t k_count = select.batch * select.kv_heads * cells_of(select.k_len);
    row_blocks = (select.k_blocks + kSweepBlocks - 1) / kSweepBlocks * kSweepBlocks;
    const int64_t cell_bytes = 2 * estimation_width(select.head_dim) * 2;
    char* next = static_cast<char*>(select.workspace);
    const auto take = [&](int64_t bytes) {
      char* begin = next;
      next += (bytes + 127) / 128 * 128;
      return begin;
    };
    q_cells = reinterpret_cast<uint4*>(take(q_count * cell_bytes));
    k_cells = reinterpret_cast<uint4*>(take(k_count * cell_bytes));
    q_factors = reinterpret_cast<float*>(take(q_count * 4));
    k_factors = reinterpret_cast<float*>(take(k_count * 4));
    scratch = reinterpret_cast<float*>(take(ctas * cta_floats() * 4));
    total_bytes = next - static_cast<char*>(select.workspace);
  }

  // Base 2 logits (units, row_blocks, rows of a unit), then masses (kGridWarps, row_blocks).
  __host__ __device__ int64_t cta_floats() const { return (kCtaRows + kGridWarps) * row_blocks; }
};

}  // namespace prism
