// Scores of query cells with all key cells they see, on tensor cores; the softmax of each query
// cell; the masses of a query block's key blocks, each the most that any of its cells gives it; and
// what the query block keeps.
//
// A warp owns 32 query cells: whole query blocks of the heads that share a key head, so that they
// read the same keys. Their statistics stay in registers while tiles of key cells pass through
// shared memory. What is left of a tile is a base 2 logit of each (query cell, key block), the
// logarithm of the block's sum: such logits need no common reference, so one pass over the keys is
// enough. They wait in the CTA's scratch until the row's total is known.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/grid/mass_row.cuh"
#include "kernels/grid/ragged_tiles.cuh"
#include "kernels/grid/workspace.h"
#include "kernels/keep/row_range.cuh"
#include "kernels/keep/top_p.cuh"

namespace prism {

// kBlockCells: cells of a key block, 4 or 8.
template <int kHeadDim_, int kBlockCells_, bool kRagged_>
struct GridShape {
  static constexpr bool kRagged = kRagged_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockCells = kBlockCells_;
  static constexpr int kThreads = 32 * kGridWarps;
  static constexpr int kWarpRows = kCtaRows / kGridWarps;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kSteps = 2 * kHeadDim / 16;  // of 16 dimensions
  static constexpr int kChunks = 2 * kHeadDim / 8;  // of 16 bytes, of a cell
  static constexpr int kTileBlocks = kTileCells / kBlockCells;
  static constexpr int kLaneBlocks = 8 / kBlockCells;  // of a tile, whose cells a lane scores
  static constexpr int kStages = 4;
  static_assert(kWarpRows == 32 && kTileCells == 32);

  struct Stage {
    uint4 cells[kTileCells * kChunks];
    float factors[kTileCells];
  };
  struct BatchStorage {
    Stage stages[kStages];
    int visible[kCtaRows];  // key cells that a row sees; 0 where there is no row
    float factors[kCtaRows];
    float log_total[kCtaRows];
  };
  struct RaggedStorage : BatchStorage {
    GridTile tile;
  };
  using Storage = std::conditional_t<kRagged, RaggedStorage, BatchStorage>;
  // Masses of a warp's row that fit in place of the stages.
  static constexpr int kSharedMasses =
      static_cast<int>(sizeof(Stage)) * kStages / 4 / kGridWarps / kSweepBlocks * kSweepBlocks;
};

// The softmax of a row so far, over the cells that one lane scored: `largest` before the row's
// factor, `sum` relative to it.
struct RunningRow {
  float largest;
  float sum;
};

template <typename Shape>
class GridCta {
 public:
  using Storage = typename Shape::Storage;

  __device__ GridCta(const GridParams& params, Storage& shared)
      : params_(params),
        shared_(shared),
        workspace_(params, gridDim.x, Shape::kRagged),
        scratch_(workspace_.scratch + blockIdx.x * workspace_.cta_floats()),
        group_(params.select.q_heads / params.select.kv_heads),
        row_shift_(params.select.q_block_size == 128 ? 3 : 2),
        block_rows_(1 << row_shift_) {
    if constexpr (!Shape::kRagged) {
      const SelectParams& select = params.select;
      extent_ = {select.q_len, select.k_len, static_cast<int>(cells_of(select.q_len)),
                 static_cast<int>(cells_of(select.k_len)),
                 group_ * static_cast<int>(select.q_blocks)};
    }
  }

  // A unit is a query block of one head: block_rows_ rows. Those of a key head are ordered by
  // query block, so that units side by side see the same keys.
  __device__ void run(int64_t kv_head, int first_unit) {
    kv_head_ = kv_head;
    const int64_t batch = Shape::kRagged ? 0 : kv_head / params_.select.kv_heads;
    const int64_t head = kv_head % params_.select.kv_heads;
    key_vectors_ = reinterpret_cast<const uint4*>(workspace_.k.vectors_of(batch, head));
    key_factors_ = workspace_.k.factors_of(batch, head);
    if constexpr (Shape::kRagged) {
      const int64_t first_cell = shared_.tile.first_k_cell;
      key_vectors_ += first_cell * Shape::kChunks;
      key_factors_ += first_cell;
    }
    first_unit_ = first_unit;
    const int cta_units = kCtaRows >> row_shift_;
    const int cta_visible = last_visible(first_unit + cta_units);
    const bool scores = params_.select.rules.any_selects(static_cast<int>(head) * group_, group_);
    const int tiles = scores ? (cta_visible + kTileCells - 1) / kTileCells : 0;
#pragma unroll 1
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
      copy_tile(stage, stage, tiles);
    }
    score(tiles);
    wait_for_copies<0>();
    __syncthreads();  // the stages become masses
#pragma unroll 1
    for (int unit = 0; unit < warp_units(); ++unit) {
      if (warp_first_unit() + unit < extent().units) {
        select_unit(unit);
      }
    }
    __syncthreads();
  }

 private:
  // Of the sequence, or of all batch elements.
  __device__ const GridExtent& extent() const {
    if constexpr (Shape::kRagged) {
      return shared_.tile.extent;
    } else {
      return extent_;
    }
  }

  __device__ int warp_units() const { return Shape::kWarpRows >> row_shift_; }
  __device__ int warp_first_unit() const { return first_unit_ + warp_index() * warp_units(); }

  // Key cells that hold a token which some query of the cell may see.
  __device__ int visible_cells(int q_cell) const {
    const GridExtent& own = extent();
    if (!params_.select.causal) {
      return own.k_cells;
    }
    const int64_t end = min(int64_t{q_cell + 1} * kCellTokens, own.q_len);
    const int64_t last = end - 1 + own.k_len - own.q_len;
    return last < 0 ? 0 : static_cast<int>(min(last / kCellTokens + 1, int64_t{own.k_cells}));
  }

  // Of the last cell of the last unit before `end_unit`: the most that any before sees.
  __device__ int last_visible(int end_unit) const {
    const int q_block = (min(end_unit, extent().units) - 1) / group_;
    return visible_cells(min((q_block + 1) * block_rows_, extent().q_cells) - 1);
  }

  // The row's query cell over the whole batch; and what it sees. If there is no row, 0 and any cell
  // that was pooled, or -1.
  __device__ int64_t find_row(int row, int& visible) const {
    const int unit = first_unit_ + (row >> row_shift_);
    const int q_cell = unit / group_ * block_rows_ + (row & (block_rows_ - 1));
    if (unit >= extent().units || q_cell >= extent().q_cells) {
      visible = 0;
      return Shape::kRagged ? place_of(unit, 0) : -1;
    }
    visible = visible_cells(q_cell);
    return place_of(unit, q_cell);
  }

  __device__ int64_t place_of(int unit, int q_cell) const {
    if constexpr (Shape::kRagged) {
      const GridTile& tile = shared_.tile;
      const int64_t head = q_head(unit) - int64_t{tile.batch} * params_.select.q_heads;
      return head * workspace_.q.factor_head_stride + tile.first_q_cell + q_cell;
    } else {
      return q_head(unit) * extent().q_cells + q_cell;
    }
  }

  // Over the batch.
  __device__ int64_t q_head(int unit) const { return kv_head_ * group_ + unit % group_; }

  // Begins to copy one tile, if there is one; one group of copies in any case. Behind the last cell
  // it is repeated: no row sees that.
  __device__ void copy_tile(int stage, int tile, int tiles) {
    if (tile < tiles) {
      constexpr int kCellsAtOnce = Shape::kThreads / Shape::kChunks;
      auto& target = shared_.stages[stage];
      const int chunk = static_cast<int>(threadIdx.x) % Shape::kChunks;
      const int first = static_cast<int>(threadIdx.x) / Shape::kChunks;
      const uint4* head = key_vectors_ + chunk;
      const int last_cell = extent().k_cells - 1 - tile * kTileCells;  // of the tile
#pragma unroll
      for (int i = 0; i < kTileCells / kCellsAtOnce; ++i) {
        const int cell = i * kCellsAtOnce + first;
        const int place = tile * kTileCells + min(cell, last_cell);
        copy_async<16>(
            shared_address(&target.cells[cell * Shape::kChunks + (chunk ^ swizzle(cell))]),
            head + place * Shape::kChunks);
      }
      if (threadIdx.x < kTileCells) {
        const int cell = static_cast<int>(threadIdx.x);
        copy_async<4>(shared_address(&target.factors[cell]),
                      key_factors_ + tile * kTileCells + min(cell, last_cell));
      }
    }
    group_copies();
  }

  // The 8 cells that one matrix load reads get different values: different banks.
  __device__ static int swizzle(int cell) { return (cell / 8 * 2 + cell % 2) % 8; }

  // Leaves logits in the scratch, and what is shared of the warp's rows.
  __device__ void score(int tiles) {
    constexpr int kRowTiles = Shape::kRowTiles;
    const int base_row = warp_index() * Shape::kWarpRows + lane_index() / 4;
    uint4 queries[kRowTiles][Shape::kSteps];
    RunningRow rows[2 * kRowTiles];  // lane / 4 + 8 i of the warp
    load_rows(base_row, queries);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      rows[i] = {-INFINITY, 0.f};
    }
    const bool has_units = warp_first_unit() < extent().units;
    const int warp_visible = has_units ? last_visible(warp_first_unit() + warp_units()) : 0;
    // Below this all rows see everything.
    const int free = has_units ? visible_cells(warp_first_unit() / group_ * block_rows_) : 0;
    int stage = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<Shape::kStages - 2>();
      __syncthreads();
      const int refill = stage == 0 ? Shape::kStages - 1 : stage - 1;
      copy_tile(refill, tile + Shape::kStages - 1, tiles);
      const int first_cell = tile * kTileCells;
      if (first_cell < warp_visible) {
        float scores[kRowTiles][4][4] = {};
        multiply(shared_.stages[stage].cells, queries, scores);
        if (first_cell + kTileCells <= free) {
          reduce<false>(tile, base_row, shared_.stages[stage].factors, scores, rows);
        } else {
          reduce<true>(tile, base_row, shared_.stages[stage].factors, scores, rows);
        }
      }
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const float total = log_total(rows[i], shared_.factors[base_row + 8 * i]);
      if (lane_index() % 4 == 0) {
        shared_.log_total[base_row + 8 * i] = total;
      }
    }
    __syncwarp();
  }

  template <int kRowTiles, int kSteps>
  __device__ void load_rows(int base_row, uint4 (&queries)[kRowTiles][kSteps]) {
    const uint32_t* sources[2 * kRowTiles];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      int visible = 0;
      // What is read for a row that does not exist is not used.
      const int64_t place = max(find_row(base_row + 8 * i, visible), int64_t{0});
      if (lane_index() % 4 == 0) {
        shared_.visible[base_row + 8 * i] = visible;
        shared_.factors[base_row + 8 * i] = workspace_.q.factors[place];
      }
      sources[i] = static_cast<const uint32_t*>(workspace_.q.vectors) +
                   place * (4 * Shape::kChunks) + lane_index() % 4;
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        queries[m][step] = {sources[2 * m][step * 8], sources[2 * m + 1][step * 8],
                            sources[2 * m][step * 8 + 4], sources[2 * m + 1][step * 8 + 4]};
      }
    }
  }

  // scores[m][n][i] is that of row 16 m + lane / 4 + 8 (i / 2) with cell 8 (lane % 4) + 2 n + i % 2
  // of the tile: the 8 cells of a lane lie side by side, one or two whole key blocks.
  template <int kRowTiles, int kSteps>
  __device__ static void multiply(const uint4* cells, const uint4 (&queries)[kRowTiles][kSteps],
                                  float (&scores)[kRowTiles][4][4]) {
    // Lane 8 j + c names row c of matrix j: column c of n = 2 pair + j / 2, half j % 2 of a step.
    const int column = lane_index() % 8;
    const int half = lane_index() / 8 % 2;
    const int cell = column / 2 * 8 + lane_index() / 16 * 2 + column % 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = (2 * step + half) ^ column;  // column is the swizzle of all its cells
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 keys = load_matrices(cells + (cell + 4 * pair) * Shape::kChunks + chunk);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma(scores[m][2 * pair], queries[m][step], keys.x, keys.y);
          mma(scores[m][2 * pair + 1], queries[m][step], keys.z, keys.w);
        }
      }
    }
  }

  // Adds a tile to the rows' softmax and writes its blocks' logits. kMasked: some row does not see
  // all of the tile.
  template <bool kMasked, int kRowTiles>
  __device__ void reduce(int tile, int base_row, const float* cell_factors,
                         const float (&scores)[kRowTiles][4][4],
                         RunningRow (&rows)[2 * kRowTiles]) {
    const int lane_cell = lane_index() % 4 * 8;
    const float4 low = *reinterpret_cast<const float4*>(cell_factors + lane_cell);
    const float4 high = *reinterpret_cast<const float4*>(cell_factors + lane_cell + 4);
    const float cell_factor[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const int first_block = tile * Shape::kTileBlocks + lane_index() % 4 * Shape::kLaneBlocks;
    // A unit's rows side by side: whoever sums over them reads 16 or 32 bytes.
    float* logits =
        scratch_ +
        (((base_row >> row_shift_) * workspace_.row_blocks + first_block) << row_shift_) +
        (base_row & (block_rows_ - 1));
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float block_largest[Shape::kLaneBlocks];
      float block_sum[Shape::kLaneBlocks];
      float largest = rows[i].largest;
      const float factor = shared_.factors[base_row + 8 * i];
      const int visible = kMasked ? shared_.visible[base_row + 8 * i] : 0;
#pragma unroll
      for (int block = 0; block < Shape::kLaneBlocks; ++block) {
        float x[Shape::kBlockCells];
        block_largest[block] = -INFINITY;
#pragma unroll
        for (int j = 0; j < Shape::kBlockCells; ++j) {
          const int cell = block * Shape::kBlockCells + j;
          x[j] = scores[i / 2][cell / 2][i % 2 * 2 + cell % 2] * cell_factor[cell];
          if (kMasked && tile * kTileCells + lane_cell + cell >= visible) {
            x[j] = -INFINITY;
          }
          block_largest[block] = fmaxf(block_largest[block], x[j]);
        }
        // Relative to its own largest, so that equal blocks get equal logits wherever they are.
        const float reference = reference_of<kMasked>(block_largest[block], factor);
        block_sum[block] = 0.f;
#pragma unroll
        for (int j = 0; j < Shape::kBlockCells; ++j) {
          block_sum[block] += exp2_approximate(fmaf(x[j], factor, -reference));
        }
        // 8 rows on are one unit, or two.
        logits[8 * i * workspace_.row_blocks + (block << row_shift_)] =
            reference + log2_approximate(block_sum[block]);
        largest = fmaxf(largest, block_largest[block]);
      }
      const float reference = reference_of<kMasked>(largest, factor);
      float sum = rows[i].sum * exp2_approximate(fmaf(rows[i].largest, factor, -reference));
#pragma unroll
      for (int block = 0; block < Shape::kLaneBlocks; ++block) {
        sum += block_sum[block] * exp2_approximate(fmaf(block_largest[block], factor, -reference));
      }
      rows[i] = {largest, sum};
    }
  }

  // What exponents are relative to; 0 where nothing was visible.
  template <bool kMasked>
  __device__ static float reference_of(float largest, float factor) {
    return kMasked && largest == -INFINITY ? 0.f : largest * factor;
  }

  // The base 2 logarithm of the row's total; NaN where it is not defined.
  __device__ static float log_total(RunningRow row, float factor) {
    // A lane that saw nothing has largest -inf and sum 0.
    const float own = fmaf(row.largest, factor, log2_approximate(row.sum));
    float largest = own;
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    float sum = exp2_approximate(own - largest);
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    return largest + log2_approximate(sum);
  }

  // The masses of a unit's `visible` key blocks, each the largest share that a row gives it: a row
  // that needs one block is not outvoted. Zeros behind them.
  template <int kBlockRows>
  __device__ void write_masses(int first_row, int visible, float* masses) const {
    float log_total[kBlockRows];
    bool sees[kBlockRows];
#pragma unroll
    for (int i = 0; i < kBlockRows; ++i) {
      log_total[i] = shared_.log_total[first_row + i];
      sees[i] = shared_.visible[first_row + i] > 0;
    }
    const float4* logits =
        reinterpret_cast<const float4*>(scratch_ + first_row * workspace_.row_blocks);
#pragma unroll 1
    for (int first = 0; first < visible; first += kSweepBlocks) {
      const int block = first + lane_index();
      // The loads of several blocks at once: they come from L2, or from behind it.
      float4 x[kSweepBlocks / 32][kBlockRows / 4];
#pragma unroll
      for (int j = 0; j < kSweepBlocks / 32; ++j) {
#pragma unroll
        for (int part = 0; part < kBlockRows / 4; ++part) {
          // Behind the last block nothing was written.
          x[j][part] = logits[min(block + 32 * j, visible - 1) * (kBlockRows / 4) + part];
        }
      }
#pragma unroll
      for (int j = 0; j < kSweepBlocks / 32; ++j) {
        float largest = -INFINITY;  // of the shares' logarithms
#pragma unroll
        for (int part = 0; part < kBlockRows / 4; ++part) {
          const float parts[4] = {x[j][part].x, x[j][part].y, x[j][part].z, x[j][part].w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float row = parts[i] - log_total[part * 4 + i];
            largest = max_or_nan(largest, sees[part * 4 + i] ? row : -INFINITY);
          }
        }
        masses[block + 32 * j] = block + 32 * j < visible ? exp2_approximate(largest) : 0.f;
      }
    }
    __syncwarp();
  }

  __device__ void select_unit(int unit_of_warp) {
    const SelectParams& select = params_.select;
    const int unit = warp_first_unit() + unit_of_warp;
    const int q_block = unit / group_;
    RowRange range;
    if constexpr (Shape::kRagged) {
      range = row_range(select, shared_.tile.lengths(select), q_block);
    } else {
      range = row_range(select, q_block);
    }
    const int first_row = warp_index() * Shape::kWarpRows + unit_of_warp * block_rows_;
    float* masses =
        workspace_.row_blocks <= Shape::kSharedMasses
            ? reinterpret_cast<float*>(shared_.stages) + warp_index() * Shape::kSharedMasses
            : scratch_ + (kCtaRows + warp_index()) * workspace_.row_blocks;
    const int head = static_cast<int>(static_cast<uint32_t>(q_head(unit)) %
                                      static_cast<uint32_t>(select.q_heads));
    bool keep_all = select.rules.top_p_of(head) >= 1.0;
    Cut cut = {INFINITY, 0};
    if (range.visible > 0 && !keep_all) {
      if (block_rows_ == 8) {
        write_masses<8>(first_row, range.visible, masses);
      } else {
        write_masses<4>(first_row, range.visible, masses);
      }
      const MassRow row(masses, range.visible);
      keep_all = !row.finite();
      if (!keep_all) {
        cut = find_cut(row, RowRules(select.rules, head));
      }
    }
    write_row((q_head(unit) * select.q_blocks + q_block), range, keep_all, cut, masses);
    __syncwarp();  // the masses are read before the next unit's are written
  }

  // A lane a word.
  __device__ void write_row(int64_t place, RowRange range, bool keep_all, Cut cut,
                            const float* masses) const {
    const int words = static_cast<int>((params_.select.k_blocks + 31) / 32);
    uint32_t* bits = params_.select.bits + place * words;
    uint32_t ties_left = cut.ties;
    uint32_t count = 0;
#pragma unroll 1
    for (int first = 0; first < words; first += 32) {
      const int word = first + lane_index();
      uint32_t kept = keep_all ? range_bits(word, 0, range.visible) : 0u;
      if (!keep_all && cut.weight < INFINITY) {
        const int end = min(first + 32, (range.visible + 31) / 32);
#pragma unroll 1
        for (int i = first; i < end; ++i) {
          const float mass = masses[i * 32 + lane_index()];
          uint32_t ballot = __ballot_sync(kAllLanes, mass > cut.weight);
          uint32_t ties = __ballot_sync(kAllLanes, mass == cut.weight);
          if (static_cast<uint32_t>(__popc(ties)) > ties_left) {
            uint32_t rest = ties;
#pragma unroll 1
            for (uint32_t j = 0; j < ties_left; ++j) {
              rest &= rest - 1;
            }
            ties &= ~rest;
          }
          ties_left -= static_cast<uint32_t>(__popc(ties));
          ballot |= ties;
          kept = word == i ? ballot : kept;
        }
      }
      kept |= range_bits(word, 0, range.sink_end) |
              range_bits(word, range.recent_begin, range.recent_end);
      if (word < words) {
        bits[word] = kept;
        count += static_cast<uint32_t>(__popc(kept));
      }
    }
    count = __reduce_add_sync(kAllLanes, count);
    if (lane_index() == 0) {
      params_.select.counts[place] = static_cast<int32_t>(count);
    }
  }

  const GridParams& params_;
  Storage& shared_;
  GridWorkspace workspace_;
  float* scratch_;
  GridExtent extent_;  // unless the batch is ragged
  int group_;
  int row_shift_;
  int block_rows_;       // query cells of a query block
  int64_t kv_head_ = 0;  // over the batch
  const uint4* key_vectors_ = nullptr;
  const float* key_factors_ = nullptr;
  int first_unit_ = 0;
};

}  // namespace prism
