// Walks the key tiles that a mask row keeps.
#pragma once

#include <cstdint>

namespace prism {

// Tiles of `tile` key rows (a divisor of the block size), from the highest down to 0: the tiles on
// the causal diagonal and at the ragged end come first, where every row still has no maximum.
class BlockIterator {
 public:
  // Tiles at and above `tile_end` are left out, whatever the mask says.
  __device__ BlockIterator(const uint32_t* row, int tiles_per_block, int tile_end)
      : row_(row), tiles_per_block_(tiles_per_block), tile_end_(tile_end) {
    const int block_end = (tile_end + tiles_per_block - 1) / tiles_per_block;
    word_index_ = block_end / 32;
    const int rest = block_end % 32;
    word_ = rest ? row_[word_index_] & ((1u << rest) - 1u) : 0u;
  }

  // The next tile, or -1.
  __device__ int next() {
    do {
      if (sub_tile_ == 0) {
        while (word_ == 0) {
          if (word_index_ == 0) {
            return -1;
          }
          word_ = row_[--word_index_];
        }
        const int bit = 31 - __clz(static_cast<int>(word_));
        word_ ^= 1u << bit;
        block_ = word_index_ * 32 + bit;
        sub_tile_ = tiles_per_block_;
      }
      --sub_tile_;
    } while (block_ * tiles_per_block_ + sub_tile_ >= tile_end_);
    return block_ * tiles_per_block_ + sub_tile_;
  }

 private:
  const uint32_t* row_;
  int tiles_per_block_;
  int tile_end_;
  int word_index_;
  uint32_t word_;
  int block_ = 0;
  int sub_tile_ = 0;
};

}  // namespace prism
