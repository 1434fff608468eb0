// Selection for 32 long query rows in a CTA, or a cluster of CTAs that share their keys.
#pragma once

#include "kernels/select/cluster.cuh"
#include "kernels/select/select_storage.cuh"

namespace prism {

// Passes over the weights of 32 rows. The scores of one band stay in registers where a segment
// holds all visible keys; longer rows are scored anew in every pass, with the same bits.
enum class Pass { kMaximum, kTotal, kSearch, kTies, kList, kMark };

template <int kHeadDim, int kCluster, int kStages>
class SelectCta {
 public:
  using Storage = SharedStorage<kHeadDim, kCluster, kStages>;

  __device__ SelectCta(const SelectBlocksParams& params, Storage& shared)
      : params_(params), shared_(shared) {
    if (threadIdx.x == 0) {
      shared.tile = RowTile::make<kHeadDim, kRows>(params, static_cast<int>(blockIdx.x) / kCluster);
      const int most_words = (shared.tile.scored_words + kCluster - 1) / kCluster;
      shared.segments = (most_words + kSegmentWords - 1) / kSegmentWords;
    }
    __syncthreads();
  }

  __device__ void run() {
    Stream stream(shared_.keys, shared_.tile.head_tiles);
    const int first_band = shared_.tile.slices[0] != 0 ? 0 : 1;
    if (shared_.segments == 1) {
      start(stream, tiles(0), first_band);
    }
    set_up_rows();
#pragma unroll 1
    for (int band = first_band; band < 2; ++band) {
      if (shared_.segments > 0 && shared_.tile.slices[band] != 0) {
        __syncthreads();  // the other band's queries are done with
        write_queries(band);
        __syncthreads();
        search_band(stream, band);
      }
    }
    ThisCluster::sync();
    write_rows();
    ThisCluster::sync();  // peers may still read this CTA's words
  }

 private:
  using Stream = SegmentStream<kHeadDim, kCluster, kStages>;
  using HeldScores = Scores<kTiles, kRowTiles>;
  using Tiles = WarpTiles<kCluster>;
  using ThisCluster = Cluster<kCluster>;

  __device__ static int rank() { return ThisCluster::rank(); }
  __device__ static int own_row() { return threadIdx.x / kRowLanes; }
  __device__ static int own_lane() { return threadIdx.x % kRowLanes; }
  // The four rows a thread holds scores of.
  __device__ static int held_row(int i) { return i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4; }

  __device__ int cta_tiles() const {
    return (shared_.tile.scored_words - rank() + kCluster - 1) / kCluster * 4;
  }
  __device__ Tiles tiles(int segment) const { return Tiles(segment, cta_tiles(), rank()); }

  __device__ void start(Stream& stream, Tiles here, int band) const {
    stream.start(here.first, here.count, shared_.tile.slices[band]);
  }

  __device__ void set_up_rows() {
    const int row = own_row() < shared_.tile.rows ? own_row() : 0;
    const int visible =
        row == own_row() ? row_range(params_, shared_.tile.q_block(row)).visible : 0;
    const float2 scales = shared_.tile.band_scales(params_, row);
    if (own_lane() == 0) {
      shared_.band_scale[0][own_row()] = scales.x;
      shared_.band_scale[1][own_row()] = scales.y;
      shared_.visible[own_row()] = visible;
      shared_.counts[own_row()] = 0;
      shared_.exchanges[own_row()] = 0;
      shared_.keep_all[own_row()] = params_.top_p >= 1.0;
    }
    __syncwarp();
  }

  __device__ void write_queries(int band) {
    const bool active = shared_.visible[own_row()] > 0;
    const float unscale = shared_.tile.template write_query<kHeadDim, kRowTiles>(
        params_, band == 0 ? params_.high : params_.low, own_row(), active, shared_.queries);
    if (own_lane() == 0) {
      const float scale = shared_.band_scale[band][own_row()] * unscale;
      // A row whose temperature is undefined keeps all it sees: nothing is known about it.
      const bool defined = isfinite(scale);
      if (active && !defined) {
        shared_.keep_all[own_row()] = 1;
      }
      shared_.scale[own_row()] = active && defined ? scale : 0.f;
    }
  }

  // Scores of a segment's tiles; what lies beyond them is garbage.
  __device__ void score(Stream& stream, Tiles here, int band, HeldScores& scores) const {
    const uint32_t slices = shared_.tile.slices[band];
    static_assert(kTiles == 2 * kTileGroup);
    clear<kTiles, kRowTiles>(scores);
    if (here.count > 0) {
      stream.template score<0, kTiles>(shared_.queries, slices, scores);
    }
    if (here.count > kTileGroup) {
      stream.template score<kTileGroup, kTiles>(shared_.queries, slices, scores);
    }
  }

  // Finds and marks what one band keeps.
  __device__ void search_band(Stream& stream, int band) {
    HeldScores scores;
    Pass pass = Pass::kMaximum;
    while (true) {
      Partial held[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        held[i] = {pass == Pass::kMaximum ? -INFINITY : 0.f, 0};
      }
#pragma unroll 1
      for (int segment = 0; segment < shared_.segments; ++segment) {
        const Tiles here = tiles(segment);
        if (pass == Pass::kMaximum || shared_.segments > 1) {
          if (shared_.segments > 1) {
            start(stream, here, band);
          }
          score(stream, here, band, scores);
          if (shared_.segments == 1 && band == 0 && shared_.tile.slices[1] != 0) {
            start(stream, here, 1);
          }
          unscale_keys(scores, here);
        }
        if (pass == Pass::kTotal || (pass != Pass::kMaximum && shared_.segments > 1)) {
          weigh(scores, here);
        }
        const bool add = band == 1 && shared_.tile.slices[0] != 0;  // to what the other keeps
        evaluate(pass, scores, here, held, add && shared_.segments == 1);
        if (pass == Pass::kMark && shared_.segments > 1) {
          __syncthreads();
          flush_words(segment, add);
          __syncthreads();
        }
      }
      if (pass == Pass::kMark) {
        return;
      }
      if (pass == Pass::kList) {
        ThisCluster::sync();
      } else {
        combine(held, pass == Pass::kMaximum);
      }
      pass = next_pass(pass, held[0]);
    }
  }

  __device__ void evaluate(Pass pass, HeldScores& scores, Tiles here, Partial (&held)[4],
                           bool add) {
    switch (pass) {
      case Pass::kMaximum:
        each_score(scores, here,
                   [&](float x, int i, int) { held[i].value = fmaxf(held[i].value, x); });
        break;
      case Pass::kTotal:
        each_score(scores, here, [&](float x, int i, int) { held[i].value += x; });
        break;
      case Pass::kSearch:
        sum_above(scores, here, held);
        break;
      case Pass::kTies:
        count_ties(scores, here, held);
        break;
      case Pass::kList:
        list_candidates(scores, here);
        break;
      case Pass::kMark:
        mark(scores, here, add);
        break;
    }
  }

  // What the owner of a row makes of a pass's result, and what the CTA does next.
  __device__ Pass next_pass(Pass pass, Partial row) {
    if (pass == Pass::kMaximum) {
      begin_weights(row.value);
      __syncthreads();
      return Pass::kTotal;
    }
    // In shared memory, and changed by one lane: registers are for scores.
    RowSearch& search = shared_.search[own_row()];
    if (pass == Pass::kList) {
      const bool any = own_lane() < shared_.list_size[own_row()];
      const Cut cut =
          search.finish(any ? shared_.listed[own_row()][own_lane()] : Candidate{0.f, 0});
      publish(__float_as_uint(cut.weight), cut.key);
      __syncthreads();
      return Pass::kMark;
    }
    __syncwarp();
    if (own_lane() == 0) {
      if (pass == Pass::kTotal) {
        search.none();
        if (shared_.visible[own_row()] > 0 && shared_.keep_all[own_row()] == 0) {
          search.begin(params_.top_p, params_.keep_above, row.value, shared_.visible[own_row()]);
        }
      } else if (pass == Pass::kSearch) {
        if (search.searching()) {
          search.narrow(row.value, row.count);
        }
      } else if (search.searching_ties()) {
        search.narrow_ties(row.count);
      }
    }
    __syncwarp();
    if (pass != Pass::kTies) {
      publish(__float_as_uint(search.threshold()), 0);
      if (__syncthreads_or(search.searching())) {
        return Pass::kSearch;
      }
    }
    const Cut tie = search.tie_threshold();
    publish(__float_as_uint(tie.weight), tie.key);
    if (__syncthreads_or(search.searching_ties())) {
      return Pass::kTies;
    }
    const uint2 bounds = search.listed();
    publish(bounds.x, static_cast<int>(bounds.y));
    __syncthreads();
    return Pass::kList;
  }

  __device__ void begin_weights(float maximum) {
    if (own_lane() == 0) {
      const bool active = shared_.visible[own_row()] > 0 && shared_.keep_all[own_row()] == 0;
      const float shift = active ? maximum * shared_.scale[own_row()] : 0.f;
      const bool known = isfinite(shift);  // not where a score overflowed
      shared_.shift[own_row()] = known ? shift : 0.f;
      shared_.list_size[own_row()] = 0;
      if (!known) {
        shared_.keep_all[own_row()] = 1;
        shared_.scale[own_row()] = 0.f;
      }
    }
  }

  __device__ void publish(uint32_t bound, int limit) {
    if (own_lane() == 0) {
      shared_.bound[own_row()] = bound;
      shared_.limit[own_row()] = limit;
    }
  }

  // The first key of the warp's tile j that this thread holds.
  __device__ static int first_key(Tiles here, int j) {
    return (here.first + j * Tiles::kStride) * kKeyTile + threadIdx.x % 4 * 2;
  }
  // Whether some row does not see all of tile j.
  __device__ bool is_partial(Tiles here, int j) const {
    return (here.first + j * Tiles::kStride + 1) * kKeyTile > shared_.tile.everywhere_visible;
  }

  // Calls f(value, i of held_row, key - first_key(here, 0)) for every score of the warp.
  template <typename F>
  __device__ static void each_score(HeldScores& scores, Tiles here, F f) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < here.count) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            f(scores[j][m][i], m * 2 + i / 2, j * Tiles::kStride * kKeyTile + i % 2);
          }
        }
      }
    }
  }

  // Sets what a row does not see to `hidden`.
  __device__ void hide(float (&tile)[kRowTiles][4], int key, float hidden) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (key + i % 2 >= shared_.visible[held_row(m * 2 + i / 2)]) {
          tile[m][i] = hidden;
        }
      }
    }
  }

  // Undoes the power of two that each key was scaled by.
  __device__ void unscale_keys(HeldScores& scores, Tiles here) const {
    const SelectWorkspace workspace(params_);
    const float* scales = workspace.key_scales + shared_.tile.kv_head * workspace.padded_keys;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < here.count) {
        const float2 scale = *reinterpret_cast<const float2*>(scales + first_key(here, j));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scores[j][m][i] *= i % 2 == 0 ? scale.x : scale.y;
          }
        }
        if (is_partial(here, j)) {
          hide(scores[j], first_key(here, j), -INFINITY);
        }
      }
    }
  }

  __device__ void weigh(HeldScores& scores, Tiles here) const {
    float scale[4];
    float shift[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = shared_.scale[held_row(i)];
      shift[i] = shared_.shift[held_row(i)];
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < here.count) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = m * 2 + i / 2;
            scores[j][m][i] = exp2_approximate(fmaf(scores[j][m][i], scale[row], -shift[row]));
          }
        }
        if (is_partial(here, j)) {
          hide(scores[j], first_key(here, j), 0.f);
        }
      }
    }
  }

  __device__ void sum_above(HeldScores& scores, Tiles here, Partial (&held)[4]) const {
    float threshold[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      threshold[i] = __uint_as_float(shared_.bound[held_row(i)]);
    }
    each_score(scores, here, [&](float x, int i, int) {
      if (x > threshold[i]) {
        held[i].value += x;
        ++held[i].count;
      }
    });
  }

  __device__ void count_ties(HeldScores& scores, Tiles here, Partial (&held)[4]) const {
    uint32_t weight[4];
    int last_tie[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = shared_.bound[held_row(i)];
      last_tie[i] = shared_.limit[held_row(i)] - first_key(here, 0);
    }
    each_score(scores, here, [&](float x, int i, int key) {
      if (__float_as_uint(x) == weight[i] && key <= last_tie[i]) {
        ++held[i].count;
      }
    });
  }

  // Adds what lies between a row's bounds to its list, in every CTA of the cluster.
  __device__ void list_candidates(HeldScores& scores, Tiles here) {
    uint32_t low[4];
    uint32_t width[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = shared_.bound[held_row(i)];
      width[i] = static_cast<uint32_t>(shared_.limit[held_row(i)]) - low[i];
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < here.count) {
        uint32_t found = 0;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const uint32_t x = __float_as_uint(scores[j][n / 4][n % 4]);
          found |= x - low[n / 2] - 1 < width[n / 2] ? 1u << n : 0u;
        }
        // One copy of the rare part: 64 of them would cost registers.
#pragma unroll 1
        for (; found != 0; found &= found - 1) {
          const int n = __ffs(static_cast<int>(found)) - 1;
          float x = scores[j][0][0];
#pragma unroll
          for (int i = 1; i < 8; ++i) {
            x = n == i ? scores[j][i / 4][i % 4] : x;
          }
          append(held_row(n / 2), {x, first_key(here, j) + n % 2});
        }
      }
    }
  }

  __device__ void append(int row, Candidate candidate) {
#pragma unroll 1
    for (int peer = 0; peer < kCluster; ++peer) {
      const int slot = atomicAdd(ThisCluster::of_peer(&shared_.list_size[row], peer), 1);
      if (slot < kCandidates) {
        *ThisCluster::of_peer(&shared_.listed[row][slot], peer) = candidate;
      }
    }
  }

  // The kept keys of a tile are one byte of each row's word.
  __device__ void mark(HeldScores& scores, Tiles here, bool add) {
    float weight[4];
    int last_tie[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = __uint_as_float(shared_.bound[held_row(i)]);
      last_tie[i] = shared_.limit[held_row(i)] - first_key(here, 0);
    }
    const int quad_lane = threadIdx.x % 4;
    auto* bytes = reinterpret_cast<uint8_t*>(shared_.words[held_row(quad_lane)]) + threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j < here.count) {
        uint32_t kept = 0;  // a byte for each of the four rows
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = m * 2 + i / 2;
            const float x = scores[j][m][i];
            const int key = j * Tiles::kStride * kKeyTile + i % 2;
            const bool keep = x > weight[row] || (x == weight[row] && key <= last_tie[row]);
            kept |= keep ? 1u << (row * 8 + i % 2) : 0u;
          }
        }
        kept <<= 2 * quad_lane;
        kept |= __shfl_xor_sync(0xffffffffu, kept, 1);
        kept |= __shfl_xor_sync(0xffffffffu, kept, 2);
        const auto byte = static_cast<uint8_t>(kept >> (8 * quad_lane));
        bytes[j * kSelectWarps] = add ? bytes[j * kSelectWarps] | byte : byte;
      }
    }
  }

  // Sums (or maximum) and counts over the cluster, in a fixed order: held[0] becomes the own row's,
  // for all lanes of its owner.
  __device__ void combine(Partial (&held)[4], bool maximum) {
    const auto merge = [&](Partial a, Partial b) {
      return Partial{maximum ? fmaxf(a.value, b.value) : a.value + b.value, a.count + b.count};
    };
    const auto shuffled = [&](Partial a, int offset) {
      return merge(a, {__shfl_xor_sync(0xffffffffu, a.value, offset),
                       __shfl_xor_sync(0xffffffffu, a.count, offset)});
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      held[i] = shuffled(held[i], 1);
    }
    const int column = threadIdx.x / 32 * 2 + threadIdx.x % 4 / 2;
    const bool odd = threadIdx.x % 2 != 0;
    shared_.partials[held_row(odd ? 2 : 0)][column] = odd ? held[2] : held[0];
    shared_.partials[held_row(odd ? 3 : 1)][column] = odd ? held[3] : held[1];
    __syncthreads();
    const Partial* mine = &shared_.partials[own_row()][own_lane() * 2];
    Partial row = merge(mine[0], mine[1]);
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
      row = shuffled(row, offset);
    }
    if constexpr (kCluster > 1) {
      // Two buffers in turn: a CTA that is ahead cannot be two exchanges ahead.
      auto& exchange = shared_.exchange[shared_.exchanges[own_row()] % 2];
      if (own_lane() < kCluster) {
        *ThisCluster::of_peer(&exchange[rank()][own_row()], own_lane()) = row;
      }
      ThisCluster::sync();
      if (own_lane() == 0) {
        ++shared_.exchanges[own_row()];
      }
      row = exchange[0][own_row()];
#pragma unroll
      for (int peer = 1; peer < kCluster; ++peer) {
        row = merge(row, exchange[peer][own_row()]);
      }
    }
    held[0] = row;
  }

  // Moves a segment's words to memory, where shared memory does not hold them all.
  __device__ void flush_words(int segment, bool add) {
    const int words = cta_tiles() / 4;
    for (int i = own_lane(); i < kSegmentWords; i += kRowLanes) {
      const int word = segment * kSegmentWords + i;
      if (own_row() < shared_.tile.rows && word < words) {
        uint32_t* target = shared_.tile.row_words(params_, own_row()) + word * kCluster + rank();
        const uint32_t kept = shared_.words[own_row()][i];
        *target = add ? *target | kept : kept;
      }
    }
  }

  // Adds what is kept in any case, counts, and writes whole rows: each CTA of the cluster its part.
  __device__ void write_rows() {
    constexpr int kThreadsOfRow = kRowLanes * kCluster;
    const int row = rank() * (kRows / kCluster) + threadIdx.x / kThreadsOfRow;
    const bool exists = row < shared_.tile.rows;
    if (exists) {
      const RowRange range = row_range(params_, shared_.tile.q_block(row));
      const int sink_end = shared_.keep_all[row] != 0 ? range.visible : range.sink_end;
      const int words = static_cast<int>((params_.k_blocks + 31) / 32);
      uint32_t* target = shared_.tile.row_words(params_, row);
      int count = 0;
      for (int word = threadIdx.x % kThreadsOfRow; word < words; word += kThreadsOfRow) {
        uint32_t bits = 0;
        if (word < shared_.tile.scored_words) {
          bits = shared_.segments > 1
                     ? __ldcg(target + word)
                     : *ThisCluster::of_peer(&shared_.words[row][word / kCluster], word % kCluster);
        }
        bits |=
            range_bits(word, 0, sink_end) | range_bits(word, range.recent_begin, range.recent_end);
        target[word] = bits;
        count += __popc(bits);
      }
      atomicAdd(&shared_.counts[row], count);
    }
    __syncthreads();
    if (exists && threadIdx.x % kThreadsOfRow == 0) {
      *shared_.tile.row_count(params_, row) = shared_.counts[row];
    }
  }

  const SelectBlocksParams& params_;
  Storage& shared_;
};

}  // namespace prism
