// Who holds a row: one warp, or a group of warps that exchange what each of them found.
#pragma once

#include <cstdint>

#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/keep/top_p.cuh"

namespace prism {

// Every function is called by all lanes, and gives all of them the same bits.
class OneWarp {
 public:
  __device__ float max(float x) const { return lanes_max(x); }
  __device__ float sum(float x) const { return lanes_sum(x); }
  __device__ uint32_t sum(uint32_t x) const { return __reduce_add_sync(kAllLanes, x); }
  __device__ Above all(Above x) const {
    return {__reduce_add_sync(kAllLanes, x.sum), __reduce_min_sync(kAllLanes, x.next_above),
            __reduce_max_sync(kAllLanes, x.next_below)};
  }
  // Also the sum in the warps ahead of this one.
  __device__ uint32_t sum(uint32_t x, uint32_t& before) const {
    before = 0;
    return sum(x);
  }
};

// 2^shift neighbouring warps with a barrier of their own. All of a CTA's groups
// have the same size, and start anew behind a barrier of the CTA.
template <int kWarps>
class WarpGroup : private OneWarp {
 public:
  // In shared memory, two in turn: who writes the next has left the barrier behind which this one
  // is read, and who writes the one after that has met all readers of this one.
  using Slots = uint4[2][kWarps];

  __device__ WarpGroup(Slots& slots, int shift) : slots_(slots), shift_(shift) {}

  __device__ int index() const { return warp_index() & (size() - 1); }  // of the warp in its group
  __device__ int group() const { return warp_index() >> shift_; }
  __device__ int size() const { return 1 << shift_; }

  __device__ float max(float x) {
    x = OneWarp::max(x);
    return shift_ == 0 ? x : OneWarp::max(__uint_as_float(exchange({__float_as_uint(x)}).x));
  }
  __device__ float sum(float x) {
    x = OneWarp::sum(x);
    if (shift_ == 0) {
      return x;
    }
    const float other = __uint_as_float(exchange({__float_as_uint(x)}).x);
    return OneWarp::sum(lane_index() < size() ? other : 0.f);
  }
  __device__ uint32_t sum(uint32_t x) {
    x = OneWarp::sum(x);
    if (shift_ == 0) {
      return x;
    }
    const uint32_t other = exchange({x}).x;
    return OneWarp::sum(lane_index() < size() ? other : 0u);
  }
  __device__ Above all(Above x) {
    x = OneWarp::all(x);
    if (shift_ == 0) {
      return x;
    }
    const uint4 other = exchange({x.sum, x.next_above, x.next_below});
    return OneWarp::all({lane_index() < size() ? other.x : 0u, other.y, other.z});
  }
  __device__ uint32_t sum(uint32_t x, uint32_t& before) {
    x = OneWarp::sum(x);
    before = 0;
    if (shift_ == 0) {
      return x;
    }
    const uint32_t other = exchange({x}).x;
    before = OneWarp::sum(lane_index() < index() ? other : 0u);
    return OneWarp::sum(lane_index() < size() ? other : 0u);
  }

 private:
  // Lane i gets what warp i % size of the group gave.
  __device__ uint4 exchange(uint4 mine) {
    uint4* slots = slots_[turn_];
    turn_ ^= 1;
    if (lane_index() == 0) {
      slots[warp_index()] = mine;
    }
    sync_threads(1 + group(), 32 << shift_);
    return slots[(group() << shift_) + (lane_index() & (size() - 1))];
  }

  Slots& slots_;
  const int shift_;
  int turn_ = 0;
};

}  // namespace prism
