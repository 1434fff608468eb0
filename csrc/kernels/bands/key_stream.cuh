// Scores of query rows with key tiles, on tensor cores. Key tiles lie in memory as the tensor
// cores want them, so every thread copies its own 16 bytes ahead into shared memory and reads them
// back: no barrier, and the copies of the next band run while this one is searched.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/bands/workspace.h"
#include "kernels/common/ptx.cuh"
#include "kernels/params.h"

namespace prism {

constexpr int kTileGroup = 4;  // key tiles that share a read of the queries

// Scores of a thread, as mma leaves them: value i of row tile m is row 16 m + lane / 4 + 8 (i / 2),
// key 2 (lane % 4) + i % 2 of the tile.
template <int kRowTiles>
using Scores = float[kTileGroup][kRowTiles][4];

template <int kRowTiles>
__device__ void clear(float (&scores)[kTileGroup][kRowTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTileGroup; ++j) {
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
template <int kHeadDim>
__device__ inline uint32_t band_slices(const Band& band) {
  uint32_t slices = 0;
#pragma unroll
  for (int slice = 0; slice < kHeadDim / kDimSlice; ++slice) {
    const uint64_t dims = band.dims[slice / 4] >> (slice % 4 * 16);
    slices |= (dims & 0xffff) != 0 ? 1u << slice : 0u;
  }
  return slices;
}

// A slice of the query rows in float16 pairs as mma's A operand: {row 01, row + 8 01, row 23,
// row + 8 23} for row lane / 4 and dimensions 4 (lane % 4) + 0 to 3.
template <int kHeadDim, int kRowTiles>
using QueryTiles = uint4[kRowTiles][kHeadDim / kDimSlice][2][32];

// How a warp walks over the key tiles of a head, in uint4.
template <int kHeadDim>
struct TileWalk {
  static constexpr int kTile = kHeadDim / kDimSlice * 32;  // of one tile

  int lane;   // where a lane begins
  int tile;   // from a tile to the next of its group
  int group;  // from a group of kTileGroup tiles to the next

  // Tiles go around kWarps warps: column n of a tile is its key block n.
  template <int kWarps>
  __device__ static TileWalk one_by_one() {
    const int thread = static_cast<int>(threadIdx.x);
    return {thread / 32 * kTile + thread % 32, kWarps * kTile, kTileGroup * kWarps * kTile};
  }

  // Groups of 32 key blocks go around: column n of tile j is key block 8 (n / 2) + 2 j + n % 2 of
  // the group, so that a thread's scores of a row are those of eight neighbours.
  template <int kWarps>
  __device__ static TileWalk by_groups() {
    const int thread = thread_anew();
    const int lane = thread % 32;
    return {(thread / 32 * kTileGroup + lane / 8) * kTile + lane % 8, 8,
            kTileGroup * kWarps * kTile};
  }
};

template <int kHeadDim, int kRowTiles, int kThreads, int kStages>
class KeyStream {
 public:
  static constexpr int kSlices = kHeadDim / kDimSlice;
  using Buffer = uint4[kStages][kTileGroup][kThreads];
  using Walk = TileWalk<kHeadDim>;

  // `head_tiles`, of the kv head, is read where it lies: registers are for scores.
  __device__ KeyStream(Buffer& buffer, const uint4* const& head_tiles, Walk walk)
      : buffer_(buffer), head_tiles_(head_tiles), walk_(walk) {}

  // Begins to copy this warp's first `count` tiles: the slices of 16 dimensions that are set in
  // `slices`.
  __device__ void start(int count, uint32_t slices) {
    source_ = walk_.lane;
    left_ = count;
    slices_ = slices;
    left_slices_ = slices;
    slot_ = 0;
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) {
      copy_ahead(slot);
    }
  }

  // The scores of the next kTileGroup tiles; what lies beyond the last tile becomes garbage.
  __device__ void score(const QueryTiles<kHeadDim, kRowTiles>& queries, uint32_t slices,
                        Scores<kRowTiles>& scores) {
    const int lane = threadIdx.x % 32;
    clear(scores);
#pragma unroll 1
    for (uint32_t left = slices; left != 0; left &= left - 1) {
      const int slice = __ffs(static_cast<int>(left)) - 1;
      wait_for_copies<kStages - 1>();
      uint4 q[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        q[m][0] = queries[m][slice][0][lane];
        q[m][1] = queries[m][slice][1][lane];
      }
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        const uint4 k = buffer_[slot_][j][threadIdx.x];  // {high, high, low, low}
        auto& d = scores[j];
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
      const uint32_t target = shared_address(&buffer_[slot][0][threadIdx.x]);
#pragma unroll
      for (int j = 0; j < kTileGroup; ++j) {
        if (j < left_) {
          copy_async<16>(target + j * kThreads * 16, source + j * walk_.tile);
        }
      }
      left_slices_ &= left_slices_ - 1;
      if (left_slices_ == 0) {
        left_slices_ = slices_;
        left_ -= kTileGroup;
        source_ += walk_.group;
      }
    }
    group_copies();
  }

  Buffer& buffer_;
  const uint4* const& head_tiles_;
  const Walk walk_;
  int source_ = 0;  // of the tile group that is copied next
  int left_ = 0;    // tiles from there on
  uint32_t slices_ = 0;
  uint32_t left_slices_ = 0;  // of the tile group
  int slot_ = 0;              // that is read next
};

}  // namespace prism
