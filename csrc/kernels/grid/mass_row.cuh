// A row of masses in memory, of which a warp keeps some.
#pragma once

#include <cstdint>

#include "kernels/common/warp.cuh"
#include "kernels/grid/workspace.h"
#include "kernels/keep/top_p.cuh"

namespace prism {

// What find_cut takes, see there.
class MassRow {
 public:
  static constexpr float kFewWeights = 16.f;
  static constexpr float kMostWeight = 2.f;  // a share of 1, however it was rounded

  // `masses`: 16-byte aligned, zeros from `visible` to the next multiple of kSweepBlocks.
  __device__ MassRow(const float* masses, int visible) : masses_(masses), visible_(visible) {
    float sum = 0.f;
    sweep([&](float x) { sum += x; });
    total_ = lanes_sum(sum);
    per_mass_ = __fdiv_rn(kProbabilityOne, total_);
  }

  // Otherwise nothing is known about the row.
  __device__ bool finite() const { return isfinite(total_) && total_ > 0.f; }

  __device__ float total() const { return total_; }
  __device__ float per_weight() const { return per_mass_; }
  __device__ float over_visible(float x) const { return x / static_cast<float>(visible_); }

  __device__ uint32_t sum_above(float threshold) const {
    float sum = 0.f;
    sweep([&](float x) { sum += x > threshold ? x : 0.f; });
    return __reduce_add_sync(kAllLanes, fixed(sum));
  }

  __device__ Above sum_and_neighbours(float threshold) const {
    float sum = 0.f;
    float lowest = INFINITY;
    float highest = 0.f;
    sweep([&](float x) {
      if (x > threshold) {
        sum += x;
        lowest = fminf(lowest, x);
      } else {
        highest = fmaxf(highest, x);
      }
    });
    return {__reduce_add_sync(kAllLanes, fixed(sum)),
            __reduce_min_sync(kAllLanes, __float_as_uint(lowest)),
            __reduce_max_sync(kAllLanes, __float_as_uint(highest))};
  }

 private:
  template <typename Visit>
  __device__ void sweep(Visit visit) const {
    const float4* vectors = reinterpret_cast<const float4*>(masses_) + lane_index();
#pragma unroll 4
    for (int first = 0; first < visible_; first += kSweepBlocks, vectors += 32) {
      const float4 x = *vectors;
      visit(x.x);
      visit(x.y);
      visit(x.z);
      visit(x.w);
    }
  }

  __device__ uint32_t fixed(float mass) const { return __float2uint_rn(mass * per_mass_); }

  const float* masses_;
  int visible_;
  float total_;
  float per_mass_;  // what a mass is multiplied by to give a share of the total in fixed point
};

}  // namespace prism
