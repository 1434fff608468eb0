// The order in which attention tiles are computed.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Which (batch, head, query block) a tile index stands for. Query heads of one KV head are
// neighbours and share its K and V in L2; the longest rows of a causal mask come first.
struct TileCoord {
  int64_t batch;
  int q_head;
  int kv_head;
  int q_block;

  __device__ TileCoord(const SparseAttentionParams& params, int64_t index, int q_blocks) {
    const int group = params.q_heads / params.kv_heads;
    const int in_group = static_cast<int>(index % group);
    index /= group;
    q_block = q_blocks - 1 - static_cast<int>(index % q_blocks);
    index /= q_blocks;
    kv_head = static_cast<int>(index % params.kv_heads);
    batch = index / params.kv_heads;
    q_head = kv_head * group + in_group;
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
        first_position(first + params.k_len - params.q_len),
        k_end(params.causal ? max(min(first_position + valid, params.k_len), 0) : params.k_len) {}

  // Whether some row may not see some key of [first_key, first_key + keys).
  __device__ bool needs_mask(const SparseAttentionParams& params, int first_key, int keys) const {
    return (params.causal && first_key + keys - 1 > first_position) ||
           first_key + keys > params.k_len;
  }

  // The last key that row `row` of the tile may see.
  __device__ int last_key(const SparseAttentionParams& params, int row) const {
    return params.causal ? min(first_position + row, params.k_len - 1) : params.k_len - 1;
  }
};

}  // namespace prism
