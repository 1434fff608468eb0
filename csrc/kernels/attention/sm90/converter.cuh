// The converter warpgroup: fp8 tiles from the staging ring into the stages that the consumers read.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "kernels/attention/fp8.cuh"
#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config_fp8.h"

namespace prism::sm90 {

// Tiles are converted in the order in which the consumers need them: K 0, K 1, V 0, K 2, V 1, ...
// across query tiles, since the last V of one is computed with the first K of the next. To wait for
// the next K before that last V holds nobody up: the consumers need both at once.
template <typename Config>
struct Converter {
  using Element = typename Config::Element;
  using Storage = typename Config::SharedStorage;
  static constexpr int kChunk = 16;  // fp8 elements that a thread converts at a time
  static constexpr int kRowChunks = Config::kHeadDim / kChunk;
  static constexpr int kRowStep = Config::kConverterThreads / kRowChunks;
  static constexpr int kShare = Config::kTileN / kRowStep;  // chunks of one thread
  static_assert(kRowStep % 8 == 0, "a thread's rows have one place in the swizzle");

  Storage& storage;
  int thread;
  Ring<Config::kStagesTile> tile_ring;

  __device__ explicit Converter(Storage& storage)
      : storage(storage), thread(static_cast<int>(threadIdx.x) % Config::kConverterThreads) {}

  __device__ void run() {
    auto& staging = storage.staging;
    uint32_t keys = 0;  // key tiles so far
    const auto convert_keys = [&](uint32_t index) {
      convert<Config::kLoadStagesK, Config::kStagesK>(index, staging.k, staging.k_full,
                                                      staging.k_free, storage.k, storage.k_full,
                                                      storage.k_free);
    };
    const auto convert_values = [&](uint32_t index) {
      convert<Config::kLoadStagesV, Config::kStagesV>(index, staging.v, staging.v_full,
                                                      staging.v_free, storage.v, storage.v_full,
                                                      storage.v_free);
    };
    for (;;) {
      storage.tile_full[tile_ring.stage()].wait(tile_ring.phase());
      const int trips = storage.tile[tile_ring.stage()].trips;
      if (trips < 0) {
        break;
      }
      storage.tile_free[tile_ring.stage()].arrive();
      tile_ring.advance();
      for (int trip = 0; trip < trips; ++trip) {
        convert_keys(keys);
        if (keys > 0) {
          convert_values(keys - 1);
        }
        ++keys;
      }
    }
    if (keys > 0) {
      convert_values(keys - 1);
    }
  }

  __device__ static void arrive(cutlass::arch::ClusterBarrier& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      barrier.arrive();
    }
  }

  template <int kFrom, int kTo, typename Staged, typename StagedFull, typename StagedFree,
            typename Stages, typename Barriers>
  __device__ __forceinline__ void convert(uint32_t index, const Staged& staged,
                                          StagedFull& staged_full, StagedFree& staged_free,
                                          Stages& stages, Barriers& full, Barriers& free) {
    const Ring<kFrom> from{index};
    const Ring<kTo> to{index};
    staged_full[from.stage()].wait(from.phase());
    const auto* source = reinterpret_cast<const uint4*>(staged[from.stage()][0]) + thread;
    uint4 codes[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      codes[i] = source[i * Config::kConverterThreads];
    }
    arrive(staged_free[from.stage()]);
    free[to.stage()].wait(to.phase() ^ 1);
    // The 128-byte swizzle of consumer.cuh's write_panel: 16-byte chunks XORed by row.
    const int row = thread / kRowChunks;
    const int column = thread % kRowChunks * kChunk;
    const int chunk = column % 64 / 8;
    // Eight neighbours, in two panels, write all banks if those of the second one begin with their
    // second half.
    const int first = column / 64 % 2;
    Element* const target = stages[to.stage()][column / 64] + row * 64;
    auto* const first_target = reinterpret_cast<uint4*>(target) + ((chunk + first) ^ (row % 8));
    auto* const other_target = reinterpret_cast<uint4*>(target) + ((chunk + 1 - first) ^ (row % 8));
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const uint4 low = convert_fp8<Element>(codes[i].x, codes[i].y);
      const uint4 high = convert_fp8<Element>(codes[i].z, codes[i].w);
      first_target[i * kRowStep * 8] = first ? high : low;
      other_target[i * kRowStep * 8] = first ? low : high;
    }
    cutlass::arch::fence_view_async_shared();  // wgmma reads what was written here
    arrive(full[to.stage()]);
  }
};

}  // namespace prism::sm90
