// From a tile's index to its sequence, heads and query rows.
#pragma once

#include <cstdint>

#include "kernels/attention/tile_coord.h"
#include "kernels/params.h"

namespace prism {

// Rows [q_start, q_start + q_len) of q attend to rows [k_start, k_start + k_len) of k and v, or to
// the first k_len tokens of the sequence's pages. In a batch that is not ragged both start at 0 of
// batch element `batch`.
struct Sequence {
  int batch;
  int q_start;
  int q_len;
  int k_start;
  int k_len;
};

struct Tile {
  Sequence sequence;
  int q_head;
  int kv_head;
  int q_block;  // of kTileM rows
};

// What the device arrays say is held within the tensors: nobody has checked them.
__device__ inline int clamp(int x, int low, int high) { return max(low, min(x, high)); }

__device__ inline void read_queries(const SparseAttentionParams& params, int batch, int& start,
                                    int& length) {
  const RaggedBatch& ragged = params.ragged;
  start = clamp(__ldg(ragged.cu_seqlens_q + batch), 0, ragged.total_q);
  const int end = clamp(__ldg(ragged.cu_seqlens_q + batch + 1), start, ragged.total_q);
  length = min(end - start, params.q_len);
}

__device__ inline void read_keys(const SparseAttentionParams& params, int batch, int& start,
                                 int& length) {
  const RaggedBatch& ragged = params.ragged;
  start = 0;
  length = params.k_len;
  if (!ragged.is_paged()) {
    start = clamp(__ldg(ragged.cu_seqlens_k + batch), 0, ragged.total_k);
    const int end = clamp(__ldg(ragged.cu_seqlens_k + batch + 1), start, ragged.total_k);
    length = min(length, end - start);
  }
  if (ragged.seqused_k != nullptr) {
    length = clamp(__ldg(ragged.seqused_k + batch), 0, length);
  }
}

// Finds tiles by ascending index. All lanes of a warp take part.
template <int kTileM>
class TileFinder {
 public:
  __device__ TileFinder(const SparseAttentionParams& params, int section)
      : params_(params), section_(section) {}

  // False: there are fewer tiles.
  __device__ bool find(int index, Tile& tile) {
    const bool ragged = params_.ragged.is_ragged();
    Sequence& sequence = tile.sequence;
    int kv_heads = params_.kv_heads;
    if (ragged) {
      if (!find_sequence(index, sequence.batch)) {
        return false;
      }
      read_queries(params_, sequence.batch, sequence.q_start, sequence.q_len);
      read_keys(params_, sequence.batch, sequence.k_start, sequence.k_len);
    } else {
      sequence = {0, 0, params_.q_len, 0, params_.k_len};
      kv_heads *= static_cast<int>(params_.batch);
    }
    const int group = params_.q_heads / params_.kv_heads;
    const int q_blocks = (sequence.q_len + kTileM - 1) / kTileM;
    const TileCoord coord(index, q_blocks, kv_heads, group, section_);
    tile.kv_head = coord.kv_head;
    if (!ragged) {
      sequence.batch = coord.kv_head / params_.kv_heads;
      tile.kv_head -= sequence.batch * params_.kv_heads;
    }
    tile.q_head = tile.kv_head * group + coord.member;
    tile.q_block = coord.q_block;
    return true;
  }

 private:
  // The tiles of one sequence follow those of the one before. `index` becomes the number among
  // those of its sequence.
  __device__ bool find_sequence(int& index, int& batch) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (; first_ < params_.batch; first_ += 32) {
      int tiles = 0;
      if (first_ + lane < params_.batch) {
        int start = 0;
        int length = 0;
        read_queries(params_, first_ + lane, start, length);
        tiles = (length + kTileM - 1) / kTileM * params_.q_heads;
      }
      int end = tiles;  // of this lane's sequence, and of those before it
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(kAll, end, step);
        end += lane >= step ? before : 0;
      }
      const unsigned later = __ballot_sync(kAll, end > index - tiles_);
      if (later != 0) {
        const int found = __ffs(static_cast<int>(later)) - 1;
        batch = first_ + found;
        index -= tiles_ + __shfl_sync(kAll, end - tiles, found);
        return true;
      }
      tiles_ += __shfl_sync(kAll, end, 31);
    }
    return false;
  }

  const SparseAttentionParams& params_;
  int section_;
  int first_ = 0;  // sequences that have no tile at or after the last index
  int tiles_ = 0;  // theirs
};

}  // namespace prism
