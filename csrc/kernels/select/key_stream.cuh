// Scores of query rows with key tiles, on tensor cores. Key tiles lie in memory as the tensor
// cores want them, so every thread copies its own 16 bytes ahead into shared memory and reads them
// back: no barrier, and the copies of the next band run while this one is searched.
#pragma once

#include <cuda_fp16.h>

#include "kernels/select/workspace.h"

namespace prism {

constexpr int kTileGroup = 4;  // key tiles that share a read of the queries

// Scores of a thread, as mma leaves them: value i of row tile m is row 16 m + lane / 4 + 8 (i / 2),
// key 2 (lane % 4) + i % 2 of the tile.
template <int kTiles, int kRowTiles>
using Scores = float[kTiles][kRowTiles][4];

template <int kTiles, int kRowTiles>
__device__ void clear(Scores<kTiles, kRowTiles>& scores) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][m][i] = 0.f;
      }
    }
  }
}

// Slices of 16 dimensions that hold any of the band's.
__device__ inline uint32_t band_slices(const Band& band) {
  uint32_t slices = 0;
#pragma unroll
  for (int slice = 0; slice < kMaxHeadDim / kDimSlice; ++slice) {
    const uint64_t dims = band.dims[slice / 4] >> (slice % 4 * 16);
    slices |= (dims & 0xffff) != 0 ? 1u << slice : 0u;
  }
  return slices;
}

__device__ inline void mma(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// A slice of the query rows in float16 pairs as mma's A operand: {row 01, row + 8 01, row 23,
// row + 8 23} for row lane / 4 and dimensions 4 (lane % 4) + 0 to 3.
template <int kHeadDim, int kRowTiles>
using QueryTiles = uint4[kRowTiles][kHeadDim / kDimSlice][2][32];

// A warp's tiles lie kStride apart.
template <int kHeadDim, int kRowTiles, int kThreads, int kStages, int kStride>
class KeyStream {
 public:
  static constexpr int kSlices = kHeadDim / kDimSlice;
  using Buffer = uint4[kStages][kTileGroup][kThreads];

  // `head_tiles`, of the kv head, is read where it lies: registers are for scores.
  __device__ KeyStream(Buffer& buffer, const uint4* const& head_tiles)
      : buffer_(buffer), head_tiles_(head_tiles) {}

  // Begins to copy this warp's `count` tiles from `first` on: the slices of 16 dimensions that are
  // set in `slices`.
  __device__ void start(int first, int count, uint32_t slices) {
    source_ = first * (kSlices * 32) + static_cast<int>(threadIdx.x % 32);
    left_ = count;
    slices_ = slices;
    left_slices_ = slices;
    slot_ = 0;
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) {
      copy_ahead(slot);
    }
  }

  // Adds the scores of the next kTileGroup tiles to scores[kFirst] and on; what lies beyond the
  // last tile becomes garbage.
  template <int kFirst, int kTiles>
  __device__ void score(const QueryTiles<kHeadDim, kRowTiles>& queries, uint32_t slices,
                        Scores<kTiles, kRowTiles>& scores) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t left = slices; left != 0; left &= left - 1) {
      const int slice = __ffs(static_cast<int>(left)) - 1;
      asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 1) : "memory");
      uint4 q[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        q[m][0] = queries[m][slice][0][lane];
        q[m][1] = queries[m][slice][1][lane];
      }
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        const uint4 k = buffer_[slot_][j][threadIdx.x];  // {high, high, low, low}
        auto& d = scores[kFirst + j];
        // Low x low is below float32's last bit.
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma(d[m], q[m][1], k.x, k.y);
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma(d[m], q[m][0], k.z, k.w);
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma(d[m], q[m][0], k.x, k.y);
        }
      }
      copy_ahead(slot_);
      slot_ = slot_ + 1 == kStages ? 0 : slot_ + 1;
    }
  }

 private:
  // One group of copies, empty at the end, so that their number tells which have arrived.
  __device__ void copy_ahead(int slot) {
    if (left_ > 0) {
      const uint4* source =
          head_tiles_ + source_ + (__ffs(static_cast<int>(left_slices_)) - 1) * 32;
      const auto target =
          static_cast<uint32_t>(__cvta_generic_to_shared(&buffer_[slot][0][threadIdx.x]));
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        if (j < left_) {
          asm volatile(
              "cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target + j * kThreads * 16),
              "l"(source + j * (kStride * kSlices * 32))
              : "memory");
        }
      }
      left_slices_ &= left_slices_ - 1;
      if (left_slices_ == 0) {
        left_slices_ = slices_;
        left_ -= kTileGroup;
        source_ += kTileGroup * (kStride * kSlices * 32);
      }
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  }

  Buffer& buffer_;
  const uint4* const& head_tiles_;
  int source_ = 0;  // of the tile group that is copied next
  int left_ = 0;    // tiles from there on
  uint32_t slices_ = 0;
  uint32_t left_slices_ = 0;  // of the tile group
  int slot_ = 0;              // that is read next
};

}  // namespace prism
