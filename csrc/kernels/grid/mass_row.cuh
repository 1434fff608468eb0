// Exact top-p, or a threshold, over a row of masses in memory, by one warp and without a sort.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/grid/workspace.h"
#include "kernels/select/warp_row.cuh"

namespace prism {

// What a row keeps: masses above `mass`, and the first `ties` that equal it.
struct MassCut {
  float mass;
  uint32_t ties;
};

class MassRow {
 public:
  static constexpr uint32_t kWarp = 0xffffffffu;
  static constexpr uint32_t kAllTies = 0xffffffffu;

  // `masses`: 16-byte aligned, zeros from `visible` to the next multiple of kSweepBlocks.
  __device__ MassRow(const float* masses, int visible) : masses_(masses), visible_(visible) {
    float sum = 0.f;
    sweep([&](float x) { sum += x; });
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kWarp, sum, offset);
    }
    total_ = sum;
    per_mass_ = __fdiv_rn(kProbabilityOne, total_);
  }

  // Otherwise nothing is known about the row.
  __device__ bool finite() const { return isfinite(total_) && total_ > 0.f; }

  __device__ MassCut cut(const RowRules& rules) const {
    MassCut result = {INFINITY, kAllTies};
    if (rules.target > 0) {
      result = search(rules);
    }
    const float least = rules.keep_above * total_;
    return least <= result.mass ? MassCut{fmaxf(least, FLT_MIN), kAllTies} : result;
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  template <typename Visit>
  __device__ void sweep(Visit visit) const {
    const float4* vectors = reinterpret_cast<const float4*>(masses_) + lane();
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

  // Keep block i, in descending order of mass (ties: lower index first), while the sum before it is
  // under top_p of the total. With G(t) the sum of the masses above t, the lowest kept mass lies in
  // (low, high] where G(low) >= target > G(high).
  __device__ MassCut search(const RowRules& rules) const {
    const uint32_t target = rules.target;
    // Masses up to here cannot make up what the target leaves, even with all sums rounded.
    const float floor =
        ((1.f - rules.top_p) * 0.999f - 2e-6f) * total_ / static_cast<float>(visible_);
    Bracket bracket(fmaxf(floor, 0.f), 2.f, rules.top_p);
    uint32_t above_low = static_cast<uint32_t>(kProbabilityOne);
    uint32_t above_high = 0;
#pragma unroll 1
    for (int pass = 0; bracket.open(); ++pass) {
      const uint32_t bits = bracket.next();
      const float threshold = __uint_as_float(bits);
      // Few masses are left, or many that are nearly equal: try the threshold's neighbours too.
      const bool close =
          pass >= 8 || static_cast<float>(above_low - above_high) < 16.f * threshold * per_mass_;
      float sum = 0.f;
      float lowest = INFINITY;
      float highest = 0.f;
      if (close) {
        sweep([&](float x) {
          if (x > threshold) {
            sum += x;
            lowest = fminf(lowest, x);
          } else {
            highest = fmaxf(highest, x);
          }
        });
      } else {
        sweep([&](float x) { sum += x > threshold ? x : 0.f; });
      }
      const uint32_t above = __reduce_add_sync(kWarp, fixed(sum));
      const uint32_t next_above = __reduce_min_sync(kWarp, __float_as_uint(lowest));
      const uint32_t next_below = __reduce_max_sync(kWarp, __float_as_uint(highest));
      const float probability = static_cast<float>(above) * (1.f / kProbabilityOne);
      if (above >= target) {
        if (close && above < target + fixed(__uint_as_float(next_above))) {
          return {__uint_as_float(next_above), kAllTies};
        }
        bracket.raise_low(close ? next_above - 1 : bits, probability);
        above_low = above;
      } else {
        if (close && above + fixed(__uint_as_float(next_below)) >= target) {
          return {__uint_as_float(next_below), 1};
        }
        bracket.lower_high(close ? max(next_below, bracket.low() + 1) : bits, probability);
        above_high = above;
      }
    }
    // Equal masses: as many as the sum still lacks.
    const float mass = __uint_as_float(bracket.high());
    const double lacking = static_cast<double>(target) - above_high;
    return {mass, static_cast<uint32_t>(
                      min(ceil(lacking / (static_cast<double>(mass) * per_mass_)), 1e9))};
  }

  const float* masses_;
  int visible_;
  float total_;
  float per_mass_;  // what a mass is multiplied by to give a share of the total in fixed point
};

}  // namespace prism
