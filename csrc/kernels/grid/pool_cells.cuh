// Statistics of the cells of q and k. With them a base 2 logit of a query and a key cell is one
// product over 2 kWidth dimensions: of {mean q, |mean q|} with {mean k, spread k}, times both
// cells' factors. The spread is a dimension's standard deviation: about what the cell's best key
// scores above its mean key, which a query that needs that one key would not find otherwise. One
// power of two scales a cell's vector into float16's range, which halves of one magnitude share.
#pragma once

#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "kernels/common/constants.h"
#include "kernels/common/half_scale.cuh"
#include "kernels/common/load_rows.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/grid/ragged_cells.cuh"
#include "kernels/grid/workspace.h"

namespace prism {

constexpr int kCellThreads = 128;

// One tensor whose cells are pooled. Of a ragged batch, a batch of one whose cells are those that
// there is room for.
struct CellTask {
  TensorView x;  // from the first token of `first_cell` on
  CellStats cells;
  int64_t length;  // of a ragged batch the most that a sequence has
  int64_t first_cell;
  uint32_t heads;
  uint32_t cells_of_head;  // that are pooled
  uint32_t count;          // of all heads and batch elements
};

struct PoolCellsArguments {
  CellTask q;
  CellTask k;
  float scale;
  int head_dim;
  RaggedBatch ragged;
  int batch;          // of a ragged batch
  int* tile_counter;  // of a ragged batch
};

__device__ inline uint4 to_halves(const float (&x)[kVector], float factor) {
  union {
    uint4 raw;
    __half2 pairs[4];
  } result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result.pairs[i] = __floats2half2_rn(x[2 * i] * factor, x[2 * i + 1] * factor);
  }
  return result.raw;
}

// A thread holds 8 dimensions of all the cell's tokens at once: many loads in flight, and the
// spread is taken around the mean, which loses nothing to cancellation.
template <typename Element, typename Shape, bool kRagged>
__global__ void __launch_bounds__(kCellThreads)
    pool_cells_kernel(const __grid_constant__ PoolCellsArguments arguments) {
  constexpr Rows kRows = Shape::kRows;
  constexpr int kLanes = Shape::kWidth / kVector;  // threads of a cell
  wait_for_producer();
  let_consumer_start();
  if (kRagged && blockIdx.x == 0 && threadIdx.x == 0) {
    *arguments.tile_counter = 0;
  }
  const int lane = threadIdx.x % kLanes;
  // Counts have 31 bits, whose divisions are much cheaper than those of 64.
  const uint32_t all = arguments.q.count + arguments.k.count;
  const uint32_t own_place = blockIdx.x * (kCellThreads / kLanes) + threadIdx.x / kLanes;
  // Threads beyond the last cell repeat it: all take part in the shuffles.
  const uint32_t place = min(own_place, all - 1);
  const bool is_key = place >= arguments.q.count;
  const CellTask& task = is_key ? arguments.k : arguments.q;
  const uint32_t index = is_key ? place - arguments.q.count : place;
  const int64_t cell = index % task.cells_of_head;
  const uint32_t all_heads_index = index / task.cells_of_head;
  const int64_t batch = all_heads_index / task.heads;
  const int64_t head = all_heads_index % task.heads;
  RaggedCell ragged_cell = {};
  if constexpr (kRagged) {
    ragged_cell =
        find_cell(arguments.ragged, arguments.batch, is_key, static_cast<int>(task.length), cell);
    if (!__any_sync(kAllLanes, ragged_cell.tokens > 0)) {
      return;
    }
  }
  const int64_t first_token = kRagged ? 0 : cell * kCellTokens;
  const int tokens = kRagged
                         ? ragged_cell.tokens
                         : static_cast<int>(min(task.length - first_token, int64_t{kCellTokens}));
  // Threads beyond the last dimension repeat the first ones; their results are zeroed.
  const bool has_dims = kRows == Rows::kWhole || lane * kVector < arguments.head_dim;
  const int first_dim = has_dims ? lane * kVector : 0;
  const Element* source = static_cast<const Element*>(task.x.data) + batch * task.x.batch_stride +
                          head * task.x.head_stride + first_token * task.x.row_stride + first_dim;
  Pack<Element> packs[kCellTokens];
  if constexpr (kRagged) {
    load_cell<kRows>(arguments.ragged, ragged_cell, is_key, task.x, source, packs);
  } else {
#pragma unroll
    for (int row = 0; row < kCellTokens; ++row) {
      const Element* from = source + min(row, tokens - 1) * task.x.row_stride;
      packs[row].raw = load<Element, kRows>(from).raw;
    }
  }
  const float share = 1.f / static_cast<float>(tokens);
  float mean[kVector];
  float second[kVector];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int row = 0; row < kCellTokens; ++row) {
      sum += row < tokens ? to_float(packs[row].element[i]) : 0.f;
    }
    mean[i] = sum * share;
    float squares = 0.f;
#pragma unroll
    for (int row = 0; row < kCellTokens; ++row) {
      const float difference = to_float(packs[row].element[i]) - mean[i];
      squares += row < tokens ? difference * difference : 0.f;
    }
    // The rounded root would branch for what float16 cannot tell apart.
    second[i] = is_key ? sqrt_approximate(squares * share) : fabsf(mean[i]);
    if (!has_dims) {
      mean[i] = second[i] = 0.f;
    }
    // Of floats without sign the bits have their order; NaN comes last.
    largest = max(largest, max(__float_as_uint(fabsf(mean[i])), __float_as_uint(second[i])));
  }
  largest = lanes_max<kLanes>(largest);
  // A cell that is not finite gets a factor of NaN, which marks all that sees it.
  const bool finite = largest < 0x7f800000u;
  const HalfScale range(__uint_as_float(finite ? largest : 0u));
  if (!finite) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      mean[i] = second[i] = 0.f;
    }
  }
  if (own_place >= all || (kRagged && tokens == 0)) {
    return;
  }
  const int64_t place_of_head = task.first_cell + cell;
  uint4* vector =
      reinterpret_cast<uint4*>(task.cells.vectors_of(batch, head)) + place_of_head * (2 * kLanes);
  vector[lane] = to_halves(mean, range.scale);
  vector[kLanes + lane] = to_halves(second, range.scale);
  if (lane == 0) {
    float factor = range.inverse;
    if (!is_key) {
      // Above 0, for the logits of hidden cells are -inf times it.
      factor = fmaxf(factor * arguments.scale * kLog2E, FLT_MIN);
    }
    task.cells.factors_of(batch, head)[place_of_head] = finite ? factor : NAN;
  }
}

}  // namespace prism
