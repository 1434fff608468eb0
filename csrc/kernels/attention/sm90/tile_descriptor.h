// What the scheduler tells the loader and the consumers about a tile.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism::sm90 {

// A power of two in size: registers for its address are scarce. Coordinates: tensor_map.h.
struct alignas(64) TileDescriptor {
  const uint32_t* mask_words;
  int q_x;  // of the first row in q, out and lse
  int q_y;
  int q_head;
  int kv_head;
  int kv_x;  // of the first key
  int kv_y;  // with pages: the sequence
  int k_len;
  int first_position;  // of the first row among the keys, or k_len if every row sees them all
  int trips;           // key tiles to compute; -1: there are no more tiles
  int box_end;         // boxes of keys before the first that no row may see
  int index;           // among the tiles of this CTA that keep any keys
  // Boxes of key rows come in descending order. Only those in which some row may not see some key
  // have to be masked: bit i stands for the box i below the last visible one, set if it is kept.
  uint32_t masked_boxes;
  int padding_boxes;  // boxes of zeros before the first: the kept ones must fill whole tiles
  uint32_t position;  // in the ring of tiles

  __device__ bool is_end() const { return trips < 0; }

  // The last key that row `row` of the tile may see.
  __device__ int last_key(int row) const { return min(first_position + row, k_len - 1); }

  // Whether a box of a block that is kept has no key that some row may see.
  __device__ bool leaves_out(int box) const { return box >= box_end; }

  __device__ int block_end(int boxes_per_block) const {
    return (box_end + boxes_per_block - 1) / boxes_per_block;
  }

  // Tiles, of kBoxes boxes, that contain a box to be masked, or padding.
  template <int kBoxes>
  __device__ int masked_tiles() const {
    return (padding_boxes + __popc(masked_boxes) + kBoxes - 1) / kBoxes;
  }

  // First key of a box, or what masks like it: past every possible key for padding, and 0 for a box
  // without a mask, whose rows see more than its width.
  template <int kBoxN>
  __device__ int first_key(int box) const {
    box -= padding_boxes;
    if (box < 0) {
      return kMaxLength;
    }
    uint32_t left = masked_boxes;
    for (int i = 0; i < box; ++i) {
      left &= left - 1;
    }
    return left == 0 ? 0 : (box_end - __ffs(static_cast<int>(left))) * kBoxN;
  }
};
static_assert(sizeof(TileDescriptor) == 64);

// A tile whose rows may see a window of keys only: its last boxes have to be masked as well.
struct WindowTileDescriptor : TileDescriptor {
  int box_begin;          // boxes of keys before the first that some row may see
  int block_begin;        // blocks of keys before the first that some row may see
  int visible_end;        // blocks of keys before the first that no row may see
  int window_first;       // first key of the first row's window; may be negative
  int window_trip;        // the first of the key tiles to be masked at the window's start
  uint32_t window_boxes;  // bit i stands for the box `box_begin` + i: kept, and to be masked there

  __device__ bool leaves_out(int box) const { return box < box_begin || box >= box_end; }

  // The first key that row `row` of the tile may see.
  __device__ int first_visible(int row) const { return max(window_first + row, 0); }

  // As above, all of them where every tile is to be masked at the window's start.
  template <int kBoxes>
  __device__ int masked_tiles() const {
    return window_trip == 0 ? trips : TileDescriptor::masked_tiles<kBoxes>();
  }

  // As above. Without a mask: where all rows' windows have begun, and none ends within the width.
  template <typename Config>
  __device__ int first_key(int box) const {
    uint32_t left = window_boxes;
    for (int i = trips * Config::kBoxes - 1 - box; i > 0 && left != 0; --i) {
      left &= left - 1;
    }
    if (left != 0) {
      return (box_begin + __ffs(static_cast<int>(left)) - 1) * Config::kBoxN;
    }
    return box < padding_boxes + __popc(masked_boxes)
               ? TileDescriptor::first_key<Config::kBoxN>(box)
               : first_visible(Config::kTileM - 1);
  }
};
static_assert(sizeof(WindowTileDescriptor) == 128);

}  // namespace prism::sm90
