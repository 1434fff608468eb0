// The order in which attention tiles are computed.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Which (head, query block) a tile index stands for. KV heads come in sections (dispatch.h). Within
// one the query blocks descend, since the last rows of a causal mask are the longest, and the query
// heads of one KV head are neighbours.
struct TileCoord {
  int kv_head;  // of `kv_heads`
  int member;   // query head of the KV head's group
  int q_block;

  __device__ TileCoord(int index, int q_blocks, int kv_heads, int group, int section) {
    const int section_tiles = section * group * q_blocks;
    const int section_index = index / section_tiles;
    const int first = section_index * section;
    const int heads = min(section, kv_heads - first);
    index -= section_index * section_tiles;
    const int row = index / (heads * group);
    index -= row * heads * group;
    q_block = q_blocks - 1 - row;
    kv_head = first + index / group;
    member = index % group;
  }
};

// The rows of one tile and the keys they may see.
struct TileRows {
  int first;           // query row
  int valid;           // rows inside q_len
  int first_position;  // token position of the first row
  int k_end;           // the first key no row of the tile may see
  int k_len;
  bool causal;

  __device__ TileRows(int q_len, int k_len, bool causal, int q_block, int tile_m)
      : first(q_block * tile_m),
        valid(min(tile_m, q_len - first)),
        first_position(first + (k_len - q_len)),
        k_end(causal ? max(min(first_position + valid, k_len), 0) : k_len),
        k_len(k_len),
        causal(causal) {}

  // Whether some row may not see some key of [first_key, first_key + keys).
  __device__ bool needs_mask(int first_key, int keys) const {
    return (causal && first_key + keys - 1 > first_position) || first_key + keys > k_len;
  }

  // The first box of `keys` keys, a power of two, for which needs_mask() holds.
  __device__ int first_masked(int keys) const {
    const int ragged = k_len / keys;
    return causal ? min(max(first_position + 1, 0) / keys, ragged) : ragged;
  }

  // The same for a window that reaches `window` keys back from each row; -1: all.
  __device__ bool needs_window(int window, int first_key) const {
    return window >= 0 && first_key < first_position + valid - 1 - window;
  }

  // The first key that row `row` of the tile may see.
  __device__ int first_key(int window, int row) const {
    return window >= 0 ? first_position + row - window : 0;
  }

  // The last key that row `row` of the tile may see.
  __device__ int last_key(int row) const {
    return causal ? min(first_position + row, k_len - 1) : k_len - 1;
  }
};

}  // namespace prism
