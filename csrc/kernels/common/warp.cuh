// What the lanes of a warp do together. Every function is called by all of them.
#pragma once

#include <cstdint>

namespace prism {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// Over groups of kLanes neighbours, a power of two; all lanes of a group get the same bits.
template <int kLanes = 32>
__device__ inline float lanes_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
template <int kLanes = 32>
__device__ inline uint32_t lanes_max(uint32_t x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = max(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
template <int kLanes = 32, typename T>
__device__ inline T lanes_sum(T x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

}  // namespace prism
