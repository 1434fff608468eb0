// fp8 rows on their way into a 16-bit tile of shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/fp8.cuh"
#include "kernels/common/ptx.cuh"

namespace prism::sm80 {

// A thread's share of a tile: the 16-byte chunks threadIdx.x + i * kThreads, counted along rows.
// They are staged in places that no other thread reads or writes: no barrier is needed between the
// copy and the conversion, and the next copy may follow that at once.
template <typename Config>
struct Fp8Rows {
  using Element = typename Config::Element;
  static constexpr int kChunk = 16;
  static constexpr int kRowChunks = Config::kHeadDim / kChunk;
  static constexpr int kShare = Config::kTileN * kRowChunks / Config::kThreads;
  static_assert(kShare * Config::kThreads == Config::kTileN * kRowChunks);

  // Rows that do not exist and columns from `columns` on become zeros and are not read. aligned:
  // every row starts on 16 bytes.
  template <typename Rows>
  __device__ static void load(const Rows& rows, int columns, bool aligned, uint4* staging) {
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int chunk = threadIdx.x + i * Config::kThreads;
        const int column = chunk % kRowChunks * kChunk;
        const uint8_t* address;
        const bool exists = rows.find(chunk / kRowChunks, address);
        const int bytes = exists ? min(max(columns - column, 0), kChunk) : 0;
        copy_async_or_zeros(shared_address(staging + chunk), bytes > 0 ? address + column : address,
                            bytes);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kShare; ++i) {
        const int chunk = threadIdx.x + i * Config::kThreads;
        const int column = chunk % kRowChunks * kChunk;
        const uint8_t* address;
        const bool exists = rows.find(chunk / kRowChunks, address);
        auto* const target = reinterpret_cast<uint8_t*>(staging + chunk);
#pragma unroll 1
        for (int j = 0; j < kChunk; ++j) {
          target[j] = exists && column + j < columns ? address[column + j] : 0;
        }
      }
    }
  }

  // Once the thread's copies have arrived.
  template <typename SmemTensor>
  __device__ static void convert(const uint4* staging, SmemTensor& smem) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int chunk = threadIdx.x + i * Config::kThreads;
      const int row = chunk / kRowChunks;
      const int column = chunk % kRowChunks * kChunk;
      const uint4 codes = staging[chunk];
      // Eight neighbours, in two panels of 64 columns, write all banks if those of the second one
      // begin with their second half.
      const int first = Config::kHeadDim > 64 ? column / 64 % 2 : 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int half = j ^ first;
        const uint4 elements = convert_fp8<Element>(half ? codes.z : codes.x,  //
                                                    half ? codes.w : codes.y);
        *reinterpret_cast<uint4*>(&smem(row, column + half * 8)) = elements;
      }
    }
  }
};

}  // namespace prism::sm80
