// From a tile's index to its sequence, heads and query rows.
#pragma once

#include <cstdint>

#include "kernels/attention/tile_coord.h"
#include "kernels/common/batch.cuh"
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
      const int batch = search_.find(index, static_cast<int>(params_.batch), [&](int other) {
        const Span q = q_span(params_.ragged, other, params_.q_len);
        return (q.length + kTileM - 1) / kTileM * params_.q_heads;
      });
      if (batch == params_.batch) {
        return false;
      }
      const Span q = q_span(params_.ragged, batch, params_.q_len);
      const Span k = k_span(params_.ragged, batch, params_.k_len);
      sequence = {batch, q.start, q.length, k.start, k.length};
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
  const SparseAttentionParams& params_;
  int section_;
  SequenceSearch search_;
};

}  // namespace prism
