// A row of the block mask, as a warp reads it.
#pragma once

#include <cstdint>

#include "kernels/common/warp.cuh"

namespace prism::sm90 {

// One mask row, read 32 words (1024 key blocks) at a time: a word a lane. Blocks at and above
// `block_end` are left out, whatever the mask says.
struct MaskRow {
  const uint32_t* words;

  __device__ bool keeps(int block) const { return __ldg(words + block / 32) >> (block % 32) & 1; }

  __device__ static int chunk_of(int block) { return block / 1024; }

  __device__ static int chunks(int block_end) { return (block_end + 1023) / 1024; }

  __device__ uint32_t word(int chunk, int block_end) const {
    const int index = chunk * 32 + static_cast<int>(threadIdx.x % 32);
    const int left = block_end - index * 32;
    if (left <= 0) {
      return 0;
    }
    return __ldg(words + index) & (left >= 32 ? 0xffffffffu : (1u << left) - 1u);
  }

  // Blocks below `block_begin` are left out, too.
  __device__ uint32_t word(int chunk, int block_begin, int block_end) const {
    const int begin = block_begin - (chunk * 32 + static_cast<int>(threadIdx.x % 32)) * 32;
    if (begin >= 32) {
      return 0;
    }
    return word(chunk, block_end) & (begin <= 0 ? 0xffffffffu : 0xffffffffu << begin);
  }
};

}  // namespace prism::sm90
