// Exact top-p over one row that a warp, or a group of warps, holds in registers: value j of a lane
// is key 32 j + lane of its warp's part, so that a ballot over value j is word j of the mask.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/select/interpolate.cuh"
#include "kernels/select/row_range.cuh"
#include "kernels/select/warp_team.cuh"

namespace prism {

// Probabilities in fixed point: integer sums do not depend on their order, and one instruction
// reduces them over a warp.
constexpr float kProbabilityOne = 0x1p31f;

// What a band keeps.
struct RowRules {
  uint32_t target;   // top_p in units of 2^-31; 0: off
  float top_p;       // in [0, 1)
  float keep_above;  // infinite: off

  __device__ explicit RowRules(const SelectBlocksParams& params) {
    // However small top_p is, the largest weight is kept: nothing comes before it.
    target = params.top_p == 0.0 ? 0u : max(__double2uint_rn(params.top_p * kProbabilityOne), 1u);
    top_p = static_cast<float>(params.top_p);
    keep_above = static_cast<float>(params.keep_above);
  }
};

template <int kValues, typename Team>
class WarpRow {
 public:
  static constexpr int kWords = (kValues + 31) / 32;  // of a lane

  // What the row keeps of this warp's part: word 32 i + lane in words[i]. Where a score or the
  // total is not finite, nothing is known about the row, and all it sees is kept. load(i) is the
  // score of the part's key i + lane, `scale` turns it into a base 2 logit; the row sees the part's
  // first `part` keys (none if negative), `visible` in all parts.
  template <typename Load>
  __device__ static void select(Load load, int part, int visible, float scale,
                                const RowRules& rules, Team& team, uint32_t (&words)[kWords]) {
    WarpRow row(team);
    row.load(load, part);
    if (!row.weigh(scale)) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = range_bits(i * 32 + lane(), 0, part);
      }
      return;
    }
    Cut cut = {INFINITY, kAll};
    if (rules.target > 0) {
      cut = row.search(rules, visible);
    }
    const float least = rules.keep_above * row.total_;
    if (least <= cut.weight) {
      cut = {least, kAll};
    }
    row.mark(cut, words);
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

  __device__ explicit WarpRow(Team& team) : team_(team) {}

  template <typename Load>
  __device__ void load(Load load, int part) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      x_[j] = -INFINITY;
      if (j * 32 + lane() < part) {
        x_[j] = load(j * 32);
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
    largest = team_.max(largest);
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      x_[j] = exp2_approximate((x_[j] - largest) * scale);
      sums[j % 2] += x_[j];
    }
    total_ = team_.sum(sums[0] + sums[1]);
    // A Newton step makes up for the approximate reciprocal. A division, here as below, may call a
    // function, before which the values would have to leave their registers.
    const float inverse = reciprocal_approximate(total_);
    per_weight_ = kProbabilityOne * fmaf(inverse, fmaf(-total_, inverse, 1.f), inverse);
    return isfinite(largest * scale) && isfinite(total_);
  }

  __device__ uint32_t fixed(float weight) const { return __float2uint_rn(weight * per_weight_); }

  // Keep block i, in descending order of weight (ties: lower index first), while the sum before it
  // is under top_p of the total. With G(t) the sum of the weights above t, the lowest kept weight
  // lies in (low, high] where G(low) >= target > G(high).
  __device__ Cut search(const RowRules& rules, int visible) const {
    const uint32_t target = rules.target;
    // Weights up to here cannot make up what the target leaves, even with all sums rounded.
    const float floor = ((1.f - rules.top_p) * 0.999f - 2e-6f) * total_ *
                        reciprocal_approximate(static_cast<float>(visible));
    Bracket bracket(fmaxf(floor, 0.f), 1.f, rules.top_p);
    uint32_t above_low = static_cast<uint32_t>(kProbabilityOne);
    uint32_t above_high = 0;
#pragma unroll 1
    for (int pass = 0; bracket.open(); ++pass) {
      const uint32_t bits = bracket.next();
      const float threshold = __uint_as_float(bits);
      // Few weights are left, or many that are nearly equal: try the threshold's neighbours too.
      const bool close =
          pass >= 8 || static_cast<float>(above_low - above_high) < 32.f * threshold * per_weight_;
      Above found = {};
      if (close) {
        found = sum_and_neighbours(threshold);
      } else {
        found.sum = sum_above(threshold);
      }
      const auto [above, next_above, next_below] = found;
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
    const double each = static_cast<double>(weight) * per_weight_;
    float ties =
        ceilf(static_cast<float>(lacking) * reciprocal_approximate(static_cast<float>(each)));
    ties += ties * each < lacking ? 1.f : 0.f;
    ties -= (ties - 1.f) * each >= lacking ? 1.f : 0.f;
    return {weight, static_cast<uint32_t>(fminf(ties, 1e9f))};
  }

  __device__ uint32_t sum_above(float threshold) const {
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (x_[j] > threshold) {
        sums[j % 2] += x_[j];
      }
    }
    return team_.sum(fixed(sums[0] + sums[1]));
  }

  __device__ Above sum_and_neighbours(float threshold) const {
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
    return team_.all({fixed(sums[0] + sums[1]), __float_as_uint(lowest), __float_as_uint(highest)});
  }

  __device__ void mark(Cut cut, uint32_t (&words)[kWords]) const {
    cut.weight = fmaxf(cut.weight, FLT_MIN);  // hidden keys weigh 0
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = 0;
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const uint32_t kept = __ballot_sync(kWarp, x_[j] >= cut.weight);
      words[j / 32] = lane() == j % 32 ? kept : words[j / 32];
    }
    if (cut.ties == kAll) {
      return;
    }
    uint32_t ties = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      ties += x_[j] == cut.weight ? 1 : 0;
    }
    uint32_t before;  // in the parts ahead of this one
    if (team_.sum(ties, before) > cut.ties) {
      drop_ties(words, cut.weight, cut.ties - min(before, cut.ties));
    }
  }

  // Keeps `left` of those that equal `weight`, the lowest keys.
  __device__ void drop_ties(uint32_t (&words)[kWords], float weight, uint32_t left) const {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      uint32_t dropped = __ballot_sync(kWarp, x_[j] == weight);
#pragma unroll 1
      for (; left > 0 && dropped != 0; --left) {
        dropped &= dropped - 1;
      }
      words[j / 32] &= lane() == j % 32 ? ~dropped : ~0u;
    }
  }

  Team& team_;
  float x_[kValues];  // scores, then weights; hidden keys -inf, then 0
  float total_;
  float per_weight_;  // what a weight is multiplied by to give a probability in fixed point
};

}  // namespace prism
