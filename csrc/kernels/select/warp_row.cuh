// Exact top-p over one row that a warp holds in registers: value j of a lane is key 32 j + lane, so
// that a ballot over value j is word j of the mask.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/select/interpolate.cuh"
#include "kernels/select/row_range.cuh"

namespace prism {

// Probabilities in fixed point: integer sums do not depend on their order, and one instruction
// reduces them over a warp.
constexpr float kProbabilityOne = 0x1p31f;

// What a band keeps.
struct KeepRules {
  uint32_t target;   // top_p in units of 2^-31; 0: off
  float top_p;       // in [0, 1)
  float keep_above;  // infinite: off

  __device__ explicit KeepRules(const SelectBlocksParams& params) {
    // However small top_p is, the largest weight is kept: nothing comes before it.
    target = params.top_p == 0.0 ? 0u : max(__double2uint_rn(params.top_p * kProbabilityOne), 1u);
    top_p = static_cast<float>(params.top_p);
    keep_above = static_cast<float>(params.keep_above);
  }
};

template <int kValues>
class WarpRow {
 public:
  // The lane's word of what the row keeps. Where a score or the total is not finite, nothing is
  // known about the row, and all it sees is kept. `scale` turns scores into base 2 logits.
  __device__ static uint32_t select(const float* scores, int visible, float scale,
                                    const KeepRules& rules) {
    WarpRow row;
    row.load(scores, visible);
    if (!row.weigh(scale)) {
      return range_bits(lane(), 0, visible);
    }
    Cut cut = {INFINITY, kAll};
    if (rules.target > 0) {
      cut = row.search(rules, visible);
    }
    const float least = rules.keep_above * row.total_;
    if (least <= cut.weight) {
      cut = {least, kAll};
    }
    return row.mark(cut);
  }

 private:
  static constexpr uint32_t kWarp = 0xffffffffu;
  static constexpr uint32_t kAll = 0xffffffffu;

  // Keeps weights above `weight`, and the first `ties` that equal it.
  struct Cut {
    float weight;
    uint32_t ties;
  };

  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  __device__ void load(const float* scores, int visible) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      x_[j] = -INFINITY;
      if (j * 32 + lane() < visible) {
        x_[j] = scores[j * 32 + lane()];
      }
    }
  }

  // Scores to weights, of which the largest is 1. False where they are not finite.
  __device__ bool weigh(float scale) {
    float largest = x_[0];
#pragma unroll
    for (int j = 1; j < kValues; ++j) {
      largest = fmaxf(largest, x_[j]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, offset));
    }
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      x_[j] = exp2_approximate((x_[j] - largest) * scale);
      sums[j % 2] += x_[j];
    }
    total_ = sums[0] + sums[1];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      total_ += __shfl_xor_sync(kWarp, total_, offset);
    }
    per_weight_ = __fdiv_rn(kProbabilityOne, total_);
    return isfinite(largest * scale) && isfinite(total_);
  }

  __device__ uint32_t fixed(float weight) const { return __float2uint_rn(weight * per_weight_); }

  // Keep block i, in descending order of weight (ties: lower index first), while the sum before it
  // is under top_p of the total. With G(t) the sum of the weights above t, the lowest kept weight
  // lies in (low, high] where G(low) >= target > G(high).
  __device__ Cut search(const KeepRules& rules, int visible) const {
    const uint32_t target = rules.target;
    // Weights up to here cannot make up what the target leaves, even with all sums rounded.
    const float floor =
        ((1.f - rules.top_p) * 0.999f - 2e-6f) * total_ / static_cast<float>(visible);
    Bracket bracket(fmaxf(floor, 0.f), 1.f, rules.top_p);
    uint32_t above_low = static_cast<uint32_t>(kProbabilityOne);
    uint32_t above_high = 0;
#pragma unroll 1
    for (int pass = 0; bracket.open(); ++pass) {
      const uint32_t bits = bracket.next();
      const float threshold = __uint_as_float(bits);
      // Few weights are left, or many that are nearly equal: try the threshold's neighbours too.
      const bool close =
          pass >= 8 || static_cast<float>(above_low - above_high) < 16.f * threshold * per_weight_;
      uint32_t next_above = 0;
      uint32_t next_below = 0;
      const uint32_t above =
          close ? sum_and_neighbours(threshold, next_above, next_below) : sum_above(threshold);
      const float probability = static_cast<float>(above) * (1.f / kProbabilityOne);
      if (above >= target) {
        if (close && above < target + fixed(__uint_as_float(next_above))) {
          return {__uint_as_float(next_above), kAll};
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
    // Equal weights: as many as the sum still lacks.
    const float weight = __uint_as_float(bracket.high());
    const double lacking = static_cast<double>(target) - above_high;
    return {weight, static_cast<uint32_t>(
                        min(ceil(lacking / (static_cast<double>(weight) * per_weight_)), 1e9))};
  }

  __device__ uint32_t sum_above(float threshold) const {
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (x_[j] > threshold) {
        sums[j % 2] += x_[j];
      }
    }
    return __reduce_add_sync(kWarp, fixed(sums[0] + sums[1]));
  }

  // Also the bits of the lowest weight above the threshold and of the highest that is not.
  __device__ uint32_t sum_and_neighbours(float threshold, uint32_t& next_above,
                                         uint32_t& next_below) const {
    float sums[2] = {0.f, 0.f};
    float lowest = INFINITY;
    float highest = 0.f;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (x_[j] > threshold) {
        sums[j % 2] += x_[j];
        lowest = fminf(lowest, x_[j]);
      } else {
        highest = fmaxf(highest, x_[j]);
      }
    }
    next_above = __reduce_min_sync(kWarp, __float_as_uint(lowest));
    next_below = __reduce_max_sync(kWarp, __float_as_uint(highest));
    return __reduce_add_sync(kWarp, fixed(sums[0] + sums[1]));
  }

  __device__ uint32_t mark(Cut cut) const {
    cut.weight = fmaxf(cut.weight, FLT_MIN);  // hidden keys weigh 0
    uint32_t word = 0;
    uint32_t ties = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const uint32_t kept = __ballot_sync(kWarp, x_[j] >= cut.weight);
      word = lane() == j ? kept : word;
    }
    if (cut.ties == kAll) {
      return word;
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      ties += x_[j] == cut.weight ? 1 : 0;
    }
    return __reduce_add_sync(kWarp, ties) > cut.ties ? drop_ties(word, cut) : word;
  }

  __device__ uint32_t drop_ties(uint32_t word, Cut cut) const {
    uint32_t left = cut.ties;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      uint32_t dropped = __ballot_sync(kWarp, x_[j] == cut.weight);
#pragma unroll 1
      for (; left > 0 && dropped != 0; --left) {
        dropped &= dropped - 1;
      }
      word = lane() == j ? word & ~dropped : word;
    }
    return word;
  }

  float x_[kValues];  // scores, then weights; hidden keys -inf, then 0
  float total_;
  float per_weight_;  // what a weight is multiplied by to give a probability in fixed point
};

}  // namespace prism
