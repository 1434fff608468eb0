// The query rows of a CTA: the query heads of one kv head side by side, block after block, so that
// a key mean read from memory serves all of them.
#pragma once

#include <cstdint>

#include "kernels/bands/emit_means.cuh"
#include "kernels/bands/key_stream.cuh"
#include "kernels/bands/temperature.cuh"
#include "kernels/bands/workspace.h"
#include "kernels/common/constants.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/keep/row_range.cuh"
#include "kernels/keep/top_p.cuh"

namespace prism {

constexpr int kRowLanes = 16;  // the half warp that prepares a row

struct RowTile {
  int first;                // row of the kv head
  int kv_head;              // over the batch
  int rows;                 // that exist; of a ragged batch there may be none
  int padded_rows;          // with those past a sequence's end, which keep nothing
  int group;                // query heads of a kv head
  int scored_words;         // mask words of keys that some row sees; 0: all are kept, unscored
  const uint4* head_tiles;  // of the kv head
  uint32_t slices[2];       // of 16 dimensions that hold any of the high, the low band
  Lengths lengths;          // of the sequence

  // Tiles of kRows rows that a kv head has, padded.
  template <int kRows>
  __device__ static int count(const SelectParams& params) {
    const int rows = params.q_heads / params.kv_heads * static_cast<int>(params.q_blocks);
    return (rows + kRows - 1) / kRows;
  }

  // Tile `index` of a kv head, from the last: the last rows see the most keys and go first.
  template <int kHeadDim, int kRows>
  __device__ static RowTile make(const BandsArguments& arguments, int kv_head, int index) {
    const SelectParams& params = arguments.select;
    const int group = params.q_heads / params.kv_heads;
    const Lengths lengths = Lengths::of(params, kv_head / params.kv_heads);
    const int first = (count<kRows>(params) - 1 - index) * kRows;
    const int rows = min(group * lengths.q_blocks - first, kRows);
    const int padded_rows = min(group * static_cast<int>(params.q_blocks) - first, kRows);
    const int last_block = (first + rows - 1) / group;
    const int first_head = kv_head % params.kv_heads * group;
    const bool scored = rows > 0 && params.rules.any_selects(first_head, group);
    const BandsWorkspace& workspace = arguments.workspace;
    return {first,
            kv_head,
            max(rows, 0),
            padded_rows,
            group,
            scored ? (row_range(params, lengths, last_block).visible + 31) / 32 : 0,
            workspace.key_tiles +
                kv_head * (workspace.padded_keys / kKeyTile) * (kHeadDim / kDimSlice * 32),
            {band_slices<kHeadDim>(arguments.high), band_slices<kHeadDim>(arguments.low)},
            lengths};
  }

  // Query head over the batch, and query block.
  __device__ int q_head(int row) const { return kv_head * group + (first + row) % group; }
  __device__ int q_block(int row) const { return (first + row) / group; }

  // log2(e) / (sqrt(d_z) tau_z) of both bands for an existing row, in all lanes of a half warp.
  __device__ float2 band_scales(const BandsArguments& arguments, int row) const {
    const SelectParams& params = arguments.select;
    const BandsWorkspace& workspace = arguments.workspace;
    const int batch = kv_head / params.kv_heads;
    const HeadEnergies q(workspace.head_energies(q_head(row) + batch * params.kv_heads),
                         EnergyChunks(lengths.q_blocks).count);
    const HeadEnergies k(workspace.head_energies(kv_head + (batch + 1) * params.q_heads),
                         EnergyChunks(lengths.k_blocks).count);
    return {kLog2E * logit_scale(params, lengths, q, k, kHighEnergy, arguments.high.size),
            kLog2E * logit_scale(params, lengths, q, k, kLowEnergy, arguments.low.size)};
  }

  // Scales and splits a row's dimensions of the band, zero elsewhere and where the row is not
  // `active`: by the half warp of lanes `lane`. Returns what undoes the scaling.
  template <int kHeadDim, int kRowTiles>
  __device__ float write_query(const BandsArguments& arguments, const Band& band, int row,
                               bool active, QueryTiles<kHeadDim, kRowTiles>& queries) const {
    constexpr int kQuads = kHeadDim / 4 / kRowLanes;  // of dimensions, a lane
    const int row_lane = threadIdx.x % kRowLanes;
    float4 values[kQuads];
    float largest = 0.f;
    const SelectParams& params = arguments.select;
    const int64_t place = q_head(active ? row : 0) * params.q_blocks + q_block(active ? row : 0);
    const float* source = arguments.workspace.q_means + place * params.head_dim;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int dim = (i * kRowLanes + row_lane) * 4;
      const uint32_t used = active ? band_nibble(band, dim) : 0;
      values[i] = {used & 1 ? source[dim] : 0.f, used & 2 ? source[dim + 1] : 0.f,
                   used & 4 ? source[dim + 2] : 0.f, used & 8 ? source[dim + 3] : 0.f};
      values[i] = finite_or_zero(values[i]);
      largest = fmaxf(largest, largest_magnitude(values[i]));
    }
    const HalfScale factor(lanes_max<kRowLanes>(largest));
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = i * kRowLanes + row_lane;
      const float4 x = values[i];
      const uint4 split = split_halves(
          {x.x * factor.scale, x.y * factor.scale, x.z * factor.scale, x.w * factor.scale});
      auto& tile = queries[row / 16][quad / 4];
      const int lane = row % 8 * 4 + quad % 4;
      const int half = row / 8 % 2;
      auto* nearest = reinterpret_cast<uint32_t*>(&tile[0][lane]);
      auto* rest = reinterpret_cast<uint32_t*>(&tile[1][lane]);
      nearest[half] = split.x;
      nearest[half + 2] = split.y;
      rest[half] = split.z;
      rest[half + 2] = split.w;
    }
    return factor.inverse;
  }

  // Band 0 or 1, the first that has dimensions, and the last.
  __device__ int first_band() const { return slices[0] != 0 ? 0 : 1; }
  __device__ int last_band() const { return slices[1] != 0 ? 1 : 0; }

  __device__ uint32_t* row_words(const SelectParams& params, int row) const {
    const int64_t words = (params.k_blocks + 31) / 32;
    return params.bits + (q_head(row) * params.q_blocks + q_block(row)) * words;
  }
  __device__ int32_t* row_count(const SelectParams& params, int row) const {
    return params.counts + q_head(row) * params.q_blocks + q_block(row);
  }
};

// A CTA's tile of query rows in shared memory, prepared by half warps, a row each.
template <int kHeadDim_, int kRowTiles_, int kThreads>
struct QueryRows {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 16 * kRowTiles;

  QueryTiles<kHeadDim, kRowTiles> queries;
  RowTile tile;
  RowRange range[kRows];
  RowRules rules[kRows];
  // Of each band: the next one's are written while rows are still searched.
  float scale[2][kRows];  // from scores to base 2 logits, once the band's queries are written
  bool keep_all[2][kRows];

  __device__ void set_up(const BandsArguments& arguments) {
    const SelectParams& params = arguments.select;
    each_row([&](int row) {
      const bool exists = row < tile.rows;
      const float2 scales = tile.band_scales(arguments, exists ? row : 0);
      if (threadIdx.x % kRowLanes == 0) {
        scale[0][row] = scales.x;
        scale[1][row] = scales.y;
        range[row] = exists ? row_range(params, tile.lengths, tile.q_block(row)) : RowRange{};
        const int head = exists ? tile.q_head(row) % params.q_heads : 0;
        rules[row] = RowRules(params.rules, head);
        keep_all[0][row] = keep_all[1][row] = params.rules.top_p_of(head) >= 1.0;
      }
      __syncwarp();
    });
  }

  // By the threads that set a row up.
  __device__ void write_queries(const BandsArguments& arguments, int band) {
    each_row([&](int row) {
      const float unscale = tile.template write_query<kHeadDim, kRowTiles>(
          arguments, band == 0 ? arguments.high : arguments.low, row, range[row].visible > 0,
          queries);
      if (threadIdx.x % kRowLanes == 0) {
        const float factor = scale[band][row] * unscale;
        // A row whose temperature is undefined keeps all it sees: nothing is known about it.
        keep_all[band][row] |= !isfinite(factor);
        scale[band][row] = factor;
      }
    });
  }

 private:
  template <typename F>
  __device__ static void each_row(F f) {
    static_assert(kRows % 2 == 0);  // whole warps
#pragma unroll 1
    for (int row = thread_anew() / kRowLanes; row < kRows; row += kThreads / kRowLanes) {
      f(row);
    }
  }
};

}  // namespace prism
