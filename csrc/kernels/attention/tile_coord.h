// The order in which attention tiles are computed.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Which (batch, head, query block) a tile index stands for. KV heads, counted over the batch, come
// in sections (dispatch.h). Within one the query blocks descend, since the last rows of a causal
// mask are the longest, and the query heads of one KV head are neighbours.
struct TileCoord {
  int batch;
  int q_head;
  int kv_head;
  int q_block;

  __device__ TileCoord(const SparseAttentionParams& params, int index, int q_blocks, int section) {
    const int group = params.q_heads / params.kv_heads;
    const int section_tiles = section * group * q_blocks;
    const int section_index = index / section_tiles;
    const int first = section_index * section;
    const int heads = min(section, static_cast<int>(params.batch) * params.kv_heads - first);
    index -= section_index * section_tiles;
    const int row = index / (heads * group);
    index -= row * heads * group;
    q_block = q_blocks - 1 - row;
    const int kv = first + index / group;
    batch = kv / params.kv_heads;
    kv_head = kv - batch * params.kv_heads;
    q_head = kv_head * group + index % group;
  }
};

// The rows of one tile and the keys they may see.
struct TileRows {
  int first;           // query row
  int valid;           // rows inside q_len
  int first_position;  // token position of the first row
  int k_end;           // the first key no row of the tile may see

  __device__ TileRows(const SparseAttentionParams& params, int q_block, int tile_m)
      : first(q_block * tile_m),
        valid(min(tile_m, params.q_len - first)),
        first_position(first + (params.k_len - params.q_len)),
        k_end(params.causal ? max(min(first_position + valid, params.k_len), 0) : params.k_len) {}

  // Whether some row may not see some key of [first_key, first_key + keys).
  __device__ bool needs_mask(const SparseAttentionParams& params, int first_key, int keys) const {
    return (params.causal && first_key + keys - 1 > first_position) ||
           first_key + keys > params.k_len;
  }

  // The first box of `keys` keys, a power of two, for which needs_mask() holds.
  __device__ int first_masked(const SparseAttentionParams& params, int keys) const {
    const int ragged = params.k_len / keys;
    return params.causal ? min(max(first_position + 1, 0) / keys, ragged) : ragged;
  }

  // The last key that row `row` of the tile may see.
  __device__ int last_key(const SparseAttentionParams& params, int row) const {
    return params.causal ? min(first_position + row, params.k_len - 1) : params.k_len - 1;
  }
};

}  // namespace prism
