// Selection for rows of up to 1,024 key blocks: tensor cores score a tile of rows, then each warp
// takes whole rows into its registers, and the search needs no barrier.
#pragma once

#include "kernels/select/query_rows.cuh"
#include "kernels/select/warp_row.cuh"

namespace prism {

constexpr int kMaxShortWords = 32;  // mask words of a short row

// 16 kRowTiles query rows, kWarps warps, up to kWords mask words.
template <int kHeadDim_, int kRowTiles_, int kWarps_, int kWords_>
struct ShortRowsShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWords = kWords_;
  static constexpr int kStages = 2;
  static constexpr int kMinCtas = 32 / kRows;  // of an SM
  static_assert(kThreads >= kRows * kRowLanes && kWords <= kMaxShortWords);

  using Stream = KeyStream<kHeadDim, kRowTiles, kThreads, kStages, kWarps>;

  struct Storage {
    typename Stream::Buffer keys;
    QueryTiles<kHeadDim, kRowTiles> queries;
    RowTile tile;
    float band_scale[2][kRows];
    int visible[kRows];
    // Of each band: the next one's are written while rows are still searched.
    float scale[2][kRows];  // from scores to base 2 logits
    int keep_all[2][kRows];
    uint32_t kept[kRows][kWords];
    // Followed by the scores: kRows rows, pitch() floats apart.
  };

  // The padding keeps the rows that a warp's tile spans in different banks. Where all rows are
  // short, a constant saves registers.
  __host__ __device__ static int pitch(int64_t k_blocks) {
    constexpr int kPadding = 8;
    return (kWords <= 8 ? kWords * 32 : static_cast<int>((k_blocks + 31) / 32 * 32)) + kPadding;
  }
  static int smem_bytes(int64_t k_blocks) {
    return static_cast<int>(sizeof(Storage)) + kRows * pitch(k_blocks) * 4;
  }
};

template <typename Shape>
class ShortRows {
 public:
  using Storage = typename Shape::Storage;

  __device__ ShortRows(const SelectBlocksParams& params, Storage& shared)
      : params_(params), shared_(shared) {
    if (threadIdx.x == 0) {
      shared.tile = RowTile::make<Shape::kHeadDim, Shape::kRows>(params, blockIdx.x);
    }
    __syncthreads();
  }

  __device__ void run() {
    const bool scored = shared_.tile.scored_words > 0;
    Stream stream(shared_.keys, shared_.tile.head_tiles);
    int band = shared_.tile.slices[0] != 0 ? 0 : 1;
    if (scored) {
      start(stream, band);
    }
    set_up_rows();
#pragma unroll 1
    for (; band < 2 && scored && shared_.tile.slices[band] != 0; ++band) {
      write_queries(band);
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

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  // The row that this thread's half warp prepares, beyond the last for some.
  __device__ static int own_row() { return threadIdx.x / kRowLanes; }

  __device__ float* scores(int row) const {
    return reinterpret_cast<float*>(&shared_ + 1) + row * Shape::pitch(params_.k_blocks);
  }

  __device__ int warp_tiles() const {
    return (shared_.tile.scored_words * (32 / kKeyTile) - warp() + Shape::kWarps - 1) /
           Shape::kWarps;
  }

  __device__ void start(Stream& stream, int band) const {
    stream.start(warp(), shared_.tile.slices[band] != 0 ? warp_tiles() : 0,
                 shared_.tile.slices[band]);
  }

  __device__ void set_up_rows() {
    const int row = own_row();
    if (row < Shape::kRows) {  // whole warps
      const bool exists = row < shared_.tile.rows;
      const float2 scales = shared_.tile.band_scales(params_, exists ? row : 0);
      if (threadIdx.x % kRowLanes == 0) {
        shared_.band_scale[0][row] = scales.x;
        shared_.band_scale[1][row] = scales.y;
        shared_.visible[row] = exists ? row_range(params_, shared_.tile.q_block(row)).visible : 0;
        shared_.keep_all[0][row] = params_.top_p >= 1.0;
        shared_.keep_all[1][row] = 0;
      }
      __syncwarp();
    }
    for (int i = threadIdx.x; i < Shape::kRows * Shape::kWords; i += Shape::kThreads) {
      (&shared_.kept[0][0])[i] = 0;
    }
    __syncthreads();
  }

  __device__ void write_queries(int band) {
    const int row = own_row();
    if (row < Shape::kRows) {
      const bool active = shared_.visible[row] > 0;
      const float unscale = shared_.tile.template write_query<Shape::kHeadDim, Shape::kRowTiles>(
          params_, band == 0 ? params_.high : params_.low, row, active, shared_.queries);
      if (threadIdx.x % kRowLanes == 0) {
        const float scale = shared_.band_scale[band][row] * unscale;
        // A row whose temperature is undefined keeps all it sees: nothing is known about it.
        shared_.keep_all[band][row] = !isfinite(scale);
        shared_.scale[band][row] = scale;
      }
    }
  }

  __device__ void score(Stream& stream, int band) {
    const SelectWorkspace workspace(params_);
    const float* key_scales = workspace.key_scales + shared_.tile.kv_head * workspace.padded_keys;
    const int count = warp_tiles();
    const int first_key = warp() * kKeyTile + lane() % 4 * 2;
#pragma unroll 1
    for (int group = 0; group < count; group += kTileGroup) {
      float2 key_scale[kTileGroup];
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        const int key = first_key + (group + j) * (Shape::kWarps * kKeyTile);
        key_scale[j] = group + j < count ? *reinterpret_cast<const float2*>(key_scales + key)
                                         : float2{0.f, 0.f};
      }
      Scores<kTileGroup, Shape::kRowTiles> tiles;
      clear<kTileGroup, Shape::kRowTiles>(tiles);
      stream.template score<0, kTileGroup>(shared_.queries, shared_.tile.slices[band], tiles);
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        if (group + j < count) {
          const int key = first_key + (group + j) * (Shape::kWarps * kKeyTile);
#pragma unroll
          for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = m * 16 + half * 8 + lane() / 4;
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
    const KeepRules rules(params_);
#pragma unroll 1
    for (int row = warp(); row < shared_.tile.rows; row += Shape::kWarps) {
      const int visible = shared_.visible[row];
      if (visible > 0 && shared_.keep_all[band][row] == 0) {
        const uint32_t word = select(scores(row), visible, shared_.scale[band][row], rules);
        if (lane() < Shape::kWords) {
          shared_.kept[row][lane()] |= word;
        }
      }
    }
  }

  // Unrolled for several lengths: rows below the diagonal differ in theirs.
  __device__ static uint32_t select(const float* scores, int visible, float scale,
                                    const KeepRules& rules) {
    if constexpr (Shape::kWords <= 8) {
      if (visible <= 2 * 32) {
        return WarpRow<2>::select(scores, visible, scale, rules);
      }
      if (visible <= 4 * 32) {
        return WarpRow<4>::select(scores, visible, scale, rules);
      }
      return WarpRow<8>::select(scores, visible, scale, rules);
    } else {
      if (visible <= 8 * 32) {
        return WarpRow<8>::select(scores, visible, scale, rules);
      }
      if (visible <= 16 * 32) {
        return WarpRow<16>::select(scores, visible, scale, rules);
      }
      if (visible <= 24 * 32) {
        return WarpRow<24>::select(scores, visible, scale, rules);
      }
      return WarpRow<32>::select(scores, visible, scale, rules);
    }
  }

  // Adds what is kept in any case, counts, and writes: a lane a word.
  __device__ void write_rows() const {
    const int words = static_cast<int>((params_.k_blocks + 31) / 32);
#pragma unroll 1
    for (int row = warp(); row < shared_.tile.rows; row += Shape::kWarps) {
      const RowRange range = row_range(params_, shared_.tile.q_block(row));
      const bool all = (shared_.keep_all[0][row] | shared_.keep_all[1][row]) != 0;
      const int sink_end = all ? range.visible : range.sink_end;
      uint32_t bits = 0;
      if (lane() < words) {
        bits = shared_.kept[row][lane()] | range_bits(lane(), 0, sink_end) |
               range_bits(lane(), range.recent_begin, range.recent_end);
        shared_.tile.row_words(params_, row)[lane()] = bits;
      }
      const uint32_t count = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(__popc(bits)));
      if (lane() == 0) {
        *shared_.tile.row_count(params_, row) = static_cast<int32_t>(count);
      }
    }
  }

  const SelectBlocksParams& params_;
  Storage& shared_;
};

}  // namespace prism
