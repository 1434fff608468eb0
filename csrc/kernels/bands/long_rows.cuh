// Selection for rows of any length: tensor cores score a tile of rows into a strip of global
// memory that each CTA reuses, then groups of warps take whole rows into their registers.
#pragma once

#include <cstdint>

#include "kernels/bands/query_rows.cuh"
#include "kernels/bands/warp_row.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/keep/warp_team.cuh"

namespace prism {

template <typename Shape>
class LongRows;

// 16 kRowTiles query rows, kWarps warps. The more rows, the fewer reads of the keys; what fits the
// 99 KB of shared memory that every supported GPU offers.
template <int kHeadDim_, int kRowTiles_, int kWarps_>
struct LongRowsShape {
  static constexpr bool kLong = true;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWords = kMaxSelectKeyBlocks / 32;
  static constexpr int kLaneWords = 64;  // the longest part of a row that a warp holds
  static constexpr int kStages = 2;
  static constexpr int kMinCtas = 1;  // of an SM
  static_assert(kWarps * kLaneWords >= kWords);

  using Stream = KeyStream<kHeadDim, kRowTiles, kThreads, kStages>;
  using Rows = LongRows<LongRowsShape>;

  struct Storage {
    typename Stream::Buffer keys;
    QueryRows<kHeadDim, kRowTiles, kThreads> rows;
    typename WarpGroup<kWarps>::Slots slots;
    int has_tile;
  };

  static int smem_bytes(const SelectParams&) {
    static_assert(sizeof(Storage) <= 99 * 1024);
    return sizeof(Storage);
  }
  static int64_t tiles(const SelectParams& params) {
    const int64_t rows = params.q_heads / params.kv_heads * params.q_blocks;
    return (rows + kRows - 1) / kRows * params.kv_heads * params.batch;
  }
};

template <typename Shape>
class LongRows {
 public:
  using Storage = typename Shape::Storage;

  __device__ LongRows(const BandsArguments& arguments, Storage& shared)
      : arguments_(arguments), params_(arguments.select), shared_(shared), rows_(shared.rows) {}

  // Draws tiles until there are no more.
  __device__ void run() {
    while (true) {
      __syncthreads();  // all are done with the tile before
      if (threadIdx.x == 0) {
        shared_.has_tile = draw_tile();
      }
      __syncthreads();
      if (shared_.has_tile == 0) {
        return;
      }
      run_tile();
    }
  }

 private:
  using Stream = typename Shape::Stream;
  using Team = WarpGroup<Shape::kWarps>;

  __device__ int words() const { return static_cast<int>((params_.k_blocks + 31) / 32); }

  __device__ float* scores(int row) const {
    const BandsWorkspace& workspace = arguments_.workspace;
    return workspace.strips +
           (static_cast<int64_t>(blockIdx.x) * Shape::kRows + row) * workspace.padded_keys;
  }

  __device__ bool draw_tile() {
    const int index = atomicAdd(arguments_.workspace.tile_counter, 1);
    const int head_tiles = RowTile::count<Shape::kRows>(params_);
    // One kv head after another: the keys of all of them may not fit into L2.
    const int kv_head = index / head_tiles;
    if (kv_head >= params_.kv_heads * static_cast<int>(params_.batch)) {
      return false;
    }
    rows_.tile =
        RowTile::make<Shape::kHeadDim, Shape::kRows>(arguments_, kv_head, index % head_tiles);
    return true;
  }

  __device__ void run_tile() {
    if (rows_.tile.rows > 0) {
      rows_.set_up(arguments_);
    }
    __syncthreads();
    if (rows_.tile.scored_words == 0) {
      keep_visible();
      return;
    }
#pragma unroll 1
    for (int band = rows_.tile.first_band(); band <= rows_.tile.last_band(); ++band) {
      score(band);
      __syncthreads();
      select_rows(band);
    }
  }

  // Groups of key tiles, a word of the mask each, that this warp scores.
  __device__ int warp_groups() const {
    return (rows_.tile.scored_words - warp_index() + Shape::kWarps - 1) / Shape::kWarps;
  }

  __device__ void score(int band) {
    const uint32_t slices = rows_.tile.slices[band];
    Stream stream(shared_.keys, rows_.tile.head_tiles,
                  Stream::Walk::template by_groups<Shape::kWarps>());
    stream.start(warp_groups() * kTileGroup, slices);
    rows_.write_queries(arguments_, band);
    __syncthreads();  // also the other band's scores are done with
    const BandsWorkspace& workspace = arguments_.workspace;
    const float* key_scales = workspace.key_scales + rows_.tile.kv_head * workspace.padded_keys;
    const int64_t step = workspace.padded_keys * 8;  // from a thread's row to its next
#pragma unroll 1
    for (int word = warp_index(); word < rows_.tile.scored_words; word += Shape::kWarps) {
      const int key = word * 32 + lane_index() % 4 * 8;  // the first of eight
      Scores<Shape::kRowTiles> x;
      stream.score(rows_.queries, slices, x);
      const float4 low = *reinterpret_cast<const float4*>(key_scales + key);
      const float4 high = *reinterpret_cast<const float4*>(key_scales + key + 4);
      float* row = scores(lane_index() / 4) + key;
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          auto* target = reinterpret_cast<float4*>(row);
          row += step;
          __stcg(target, float4{x[0][m][i] * low.x, x[0][m][i + 1] * low.y, x[1][m][i] * low.z,
                                x[1][m][i + 1] * low.w});
          __stcg(target + 1, float4{x[2][m][i] * high.x, x[2][m][i + 1] * high.y,
                                    x[3][m][i] * high.z, x[3][m][i + 1] * high.w});
        }
      }
    }
  }

  __device__ void select_rows(int band) {
    const int words = rows_.tile.scored_words;
    int shift = 0;  // of the number of warps that share a row
    while (Shape::kLaneWords << shift < words) {
      ++shift;
    }
    const int part_words = (words + (1 << shift) - 1) >> shift;
    if (part_words <= 32) {
      select_rows<32>(band, shift, part_words);
    } else if (part_words <= 48) {
      select_rows<48>(band, shift, part_words);
    } else {
      select_rows<64>(band, shift, part_words);
    }
  }

  template <int kValues>
  __device__ void select_rows(int band, int shift, int part_words) {
    Team team(shared_.slots, shift);
    const int first_key = team.index() * part_words * 32;
#pragma unroll 1
    for (int row = team.group(); row < rows_.tile.padded_rows; row += Shape::kWarps >> shift) {
      const int visible = rows_.range[row].visible;
      const int part = min(visible - first_key, part_words * 32);
      using Row = WarpRow<kValues, Team>;
      uint32_t kept[Row::kWords];
      if (visible > 0 && !rows_.keep_all[band][row]) {
        const float* source = scores(row) + first_key + lane_index();
        Row::select([&](int i) { return __ldcg(source + i); }, part, visible,
                    rows_.scale[band][row], rows_.rules[row], team, kept);
      } else {
#pragma unroll
        for (int i = 0; i < Row::kWords; ++i) {
          kept[i] = range_bits(i * 32 + lane_index(), 0, part);
        }
      }
      write_row(band, row, team, part_words, kept);
    }
  }

  // Adds what this band keeps to the row; the first one what is kept in any case; the last counts.
  template <int kWords>
  __device__ void write_row(int band, int row, Team& team, int part_words,
                            const uint32_t (&kept)[kWords]) const {
    const bool first_band = band == rows_.tile.first_band();
    const int first_word = team.index() * part_words;
    const RowRange range = rows_.range[row];
    uint32_t* target = rows_.tile.row_words(params_, row);
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = first_word + i * 32 + lane_index();
      if (i * 32 + lane_index() < part_words && word < words()) {
        const uint32_t others =
            first_band ? range_bits(word, 0, range.sink_end) | range_bits(word, range.recent_begin,
                                                                          range.recent_end)
                       : target[word];  // written by this thread
        target[word] = kept[i] | others;
        count += __popc(kept[i] | others);
      }
    }
    if (first_band) {
      const int first_hidden = part_words * team.size();
      for (int word = first_hidden + team.index() * 32 + lane_index(); word < words();
           word += team.size() * 32) {
        target[word] = 0;
      }
    }
    if (band == rows_.tile.last_band()) {
      count = team.sum(count);
      if (team.index() == 0 && lane_index() == 0) {
        *rows_.tile.row_count(params_, row) = static_cast<int32_t>(count);
      }
    }
  }

  // A warp a row.
  __device__ void keep_visible() const {
#pragma unroll 1
    for (int row = warp_index(); row < rows_.tile.padded_rows; row += Shape::kWarps) {
      uint32_t* target = rows_.tile.row_words(params_, row);
      const int visible = row < rows_.tile.rows ? rows_.range[row].visible : 0;
      for (int word = lane_index(); word < words(); word += 32) {
        target[word] = range_bits(word, 0, visible);
      }
      if (lane_index() == 0) {
        *rows_.tile.row_count(params_, row) = visible;
      }
    }
  }

  const BandsArguments& arguments_;
  const SelectParams& params_;
  Storage& shared_;
  QueryRows<Shape::kHeadDim, Shape::kRowTiles, Shape::kThreads>& rows_;
};

}  // namespace prism
