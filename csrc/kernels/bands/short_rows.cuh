// Selection for rows of up to 1,024 key blocks: tensor cores score a tile of rows, then each warp
// takes whole rows into its registers, and the search needs no barrier.
#pragma once

#include <cstdint>

#include "kernels/bands/query_rows.cuh"
#include "kernels/bands/warp_row.cuh"
#include "kernels/common/warp.cuh"

namespace prism {

constexpr int kMaxShortWords = 32;  // mask words of a short row

template <typename Shape>
class ShortRows;

// 16 kRowTiles query rows, kWarps warps, up to kWords mask words.
template <int kHeadDim_, int kRowTiles_, int kWarps_, int kWords_>
struct ShortRowsShape {
  static constexpr bool kLong = false;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWords = kWords_;
  static constexpr int kStages = 2;
  static constexpr int kMinCtas = 32 / kRows;  // of an SM
  static_assert(kThreads >= kRows * kRowLanes && kWords <= kMaxShortWords);

  using Stream = KeyStream<kHeadDim, kRowTiles, kThreads, kStages>;
  using Rows = ShortRows<ShortRowsShape>;

  struct Storage {
    typename Stream::Buffer keys;
    QueryRows<kHeadDim, kRowTiles, kThreads> rows;
    uint32_t kept[kRows][kWords];
    // Followed by the scores: kRows rows, pitch() floats apart.
  };

  // The padding keeps the rows that a warp's tile spans in different banks. Where all rows are
  // short, a constant saves registers.
  __host__ __device__ static int pitch(int64_t k_blocks) {
    constexpr int kPadding = 8;
    return (kWords <= 8 ? kWords * 32 : static_cast<int>((k_blocks + 31) / 32 * 32)) + kPadding;
  }
  static int smem_bytes(const SelectParams& params) {
    return static_cast<int>(sizeof(Storage)) + kRows * pitch(params.k_blocks) * 4;
  }
  static int64_t tiles(const SelectParams& params) {
    const int64_t rows = params.q_heads / params.kv_heads * params.q_blocks;
    return (rows + kRows - 1) / kRows * params.kv_heads * params.batch;
  }
};

template <typename Shape>
class ShortRows {
 public:
  using Storage = typename Shape::Storage;

  __device__ ShortRows(const BandsArguments& arguments, Storage& shared)
      : arguments_(arguments), params_(arguments.select), shared_(shared), rows_(shared.rows) {
    if (threadIdx.x == 0) {
      const int kv_heads = static_cast<int>(params_.batch) * params_.kv_heads;
      const int index = static_cast<int>(blockIdx.x);
      rows_.tile = RowTile::make<Shape::kHeadDim, Shape::kRows>(arguments, index % kv_heads,
                                                                index / kv_heads);
    }
    __syncthreads();
  }

  __device__ void run() {
    clear_padding();
    if (rows_.tile.rows == 0) {
      return;
    }
    const bool scored = rows_.tile.scored_words > 0;
    Stream stream(shared_.keys, rows_.tile.head_tiles,
                  Stream::Walk::template one_by_one<Shape::kWarps>());
    int band = rows_.tile.first_band();
    if (scored) {
      start(stream, band);
    }
    set_up();
#pragma unroll 1
    for (; band < 2 && scored && rows_.tile.slices[band] != 0; ++band) {
      rows_.write_queries(arguments_, band);
      __syncthreads();  // also the other band's scores are done with
      score(stream, band);
      if (band == 0) {
        start(stream, 1);
      }
      __syncthreads();
      select_rows(band);
    }
    __syncwarp();
    write_rows();
  }

 private:
  using Stream = typename Shape::Stream;

  __device__ float* scores(int row) const {
    return reinterpret_cast<float*>(&shared_ + 1) + row * Shape::pitch(params_.k_blocks);
  }

  __device__ int warp_tiles() const {
    return (rows_.tile.scored_words * (32 / kKeyTile) - warp_index() + Shape::kWarps - 1) /
           Shape::kWarps;
  }

  __device__ void start(Stream& stream, int band) const {
    stream.start(rows_.tile.slices[band] != 0 ? warp_tiles() : 0, rows_.tile.slices[band]);
  }

  __device__ void set_up() {
    rows_.set_up(arguments_);
    for (int i = threadIdx.x; i < Shape::kRows * Shape::kWords; i += Shape::kThreads) {
      (&shared_.kept[0][0])[i] = 0;
    }
    __syncthreads();
  }

  __device__ void score(Stream& stream, int band) {
    const BandsWorkspace& workspace = arguments_.workspace;
    const float* key_scales = workspace.key_scales + rows_.tile.kv_head * workspace.padded_keys;
    const int count = warp_tiles();
    const int first_key = warp_index() * kKeyTile + lane_index() % 4 * 2;
#pragma unroll 1
    for (int group = 0; group < count; group += kTileGroup) {
      float2 key_scale[kTileGroup];
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        const int key = first_key + (group + j) * (Shape::kWarps * kKeyTile);
        key_scale[j] = group + j < count ? *reinterpret_cast<const float2*>(key_scales + key)
                                         : float2{0.f, 0.f};
      }
      Scores<Shape::kRowTiles> tiles;
      stream.score(rows_.queries, rows_.tile.slices[band], tiles);
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        if (group + j < count) {
          const int key = first_key + (group + j) * (Shape::kWarps * kKeyTile);
#pragma unroll
          for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = m * 16 + half * 8 + lane_index() / 4;
              *reinterpret_cast<float2*>(scores(row) + key) = {
                  tiles[j][m][half * 2] * key_scale[j].x,
                  tiles[j][m][half * 2 + 1] * key_scale[j].y};
            }
          }
        }
      }
    }
  }

  __device__ void select_rows(int band) {
#pragma unroll 1
    for (int row = warp_index(); row < rows_.tile.rows; row += Shape::kWarps) {
      const int visible = rows_.range[row].visible;
      if (visible > 0 && !rows_.keep_all[band][row]) {
        const uint32_t word =
            select(scores(row), visible, rows_.scale[band][row], rows_.rules[row]);
        if (lane_index() < Shape::kWords) {
          shared_.kept[row][lane_index()] |= word;
        }
      }
    }
  }

  template <int kValues>
  __device__ static uint32_t select_values(const float* scores, int visible, float scale,
                                           const RowRules& rules) {
    OneWarp team;
    uint32_t words[1];
    scores += lane_index();
    WarpRow<kValues, OneWarp>::select([&](int i) { return scores[i]; }, visible, visible, scale,
                                      rules, team, words);
    return words[0];
  }

  // Unrolled for several lengths: rows below the diagonal differ in theirs.
  __device__ static uint32_t select(const float* scores, int visible, float scale,
                                    const RowRules& rules) {
    if constexpr (Shape::kWords <= 8) {
      if (visible <= 2 * 32) {
        return select_values<2>(scores, visible, scale, rules);
      }
      if (visible <= 4 * 32) {
        return select_values<4>(scores, visible, scale, rules);
      }
      return select_values<8>(scores, visible, scale, rules);
    } else {
      if (visible <= 8 * 32) {
        return select_values<8>(scores, visible, scale, rules);
      }
      if (visible <= 16 * 32) {
        return select_values<16>(scores, visible, scale, rules);
      }
      if (visible <= 24 * 32) {
        return select_values<24>(scores, visible, scale, rules);
      }
      return select_values<32>(scores, visible, scale, rules);
    }
  }

  // Rows past a sequence's end: a warp a row, a lane a word.
  __device__ void clear_padding() const {
    const int words = static_cast<int>((params_.k_blocks + 31) / 32);
#pragma unroll 1
    for (int row = rows_.tile.rows + warp_index(); row < rows_.tile.padded_rows;
         row += Shape::kWarps) {
      if (lane_index() < words) {
        rows_.tile.row_words(params_, row)[lane_index()] = 0;
      }
      if (lane_index() == 0) {
        *rows_.tile.row_count(params_, row) = 0;
      }
    }
  }

  // Adds what is kept in any case, counts, and writes: a lane a word.
  __device__ void write_rows() const {
    const int words = static_cast<int>((params_.k_blocks + 31) / 32);
#pragma unroll 1
    for (int row = warp_index(); row < rows_.tile.rows; row += Shape::kWarps) {
      const RowRange range = rows_.range[row];
      const bool all = rows_.keep_all[0][row] || rows_.keep_all[1][row];
      const int sink_end = all ? range.visible : range.sink_end;
      uint32_t bits = 0;
      if (lane_index() < words) {
        bits = shared_.kept[row][lane_index()] | range_bits(lane_index(), 0, sink_end) |
               range_bits(lane_index(), range.recent_begin, range.recent_end);
        rows_.tile.row_words(params_, row)[lane_index()] = bits;
      }
      const uint32_t count = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(__popc(bits)));
      if (lane_index() == 0) {
        *rows_.tile.row_count(params_, row) = static_cast<int32_t>(count);
      }
    }
  }

  const BandsArguments& arguments_;
  const SelectParams& params_;
  Storage& shared_;
  QueryRows<Shape::kHeadDim, Shape::kRowTiles, Shape::kThreads>& rows_;
};

}  // namespace prism
