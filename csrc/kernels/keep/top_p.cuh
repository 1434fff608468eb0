// What a row keeps of its weights, exactly and without a sort: the least weight that top-p or the
// threshold leaves.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/keep/bracket.cuh"
#include "kernels/params.h"

namespace prism {

// Probabilities in fixed point: integer sums do not depend on their order, and one instruction
// reduces them over a warp.
constexpr float kProbabilityOne = 0x1p31f;

// The rules that choose among a row's weights.
struct RowRules {
  uint32_t target;   // top_p in units of 2^-31; 0: off
  float top_p;       // in [0, 1)
  float keep_above;  // infinite: off

  RowRules() = default;
  __device__ RowRules(const KeepRules& rules, int q_head)
      : top_p(static_cast<float>(rules.top_p_of(q_head))),
        keep_above(static_cast<float>(rules.keep_above_of(q_head))) {
    // However small top_p is, the largest weight is kept: nothing comes before it.
    const double exact = rules.top_p_of(q_head);
    target = exact == 0.0 ? 0u : max(__double2uint_rn(exact * kProbabilityOne), 1u);
  }
};

// Keeps weights above `weight`, and of those that equal it the first `ties` keys.
struct Cut {
  float weight;
  uint32_t ties;
};
constexpr uint32_t kAllTies = 0xffffffffu;

// The weights above a threshold: their sum, in fixed point, the bits of the lowest of them, and of
// the highest weight that is not above.
struct Above {
  uint32_t sum;
  uint32_t next_above;
  uint32_t next_below;
};

// As many equal weights as `lacking` asks for, each worth `each`: ceil(lacking / each). A division
// may call a function, before which the row's weights would have to leave their registers.
__device__ inline uint32_t count_ties(double lacking, double each) {
  float ties =
      ceilf(static_cast<float>(lacking) * reciprocal_approximate(static_cast<float>(each)));
  ties += ties * each < lacking ? 1.f : 0.f;
  ties -= (ties - 1.f) * each >= lacking ? 1.f : 0.f;
  return static_cast<uint32_t>(fminf(ties, 1e9f));
}

// Keep block i, in descending order of weight (ties: lower index first), while the sum before it is
// under top_p of the total. With G(t) the sum of the weights above t, the lowest kept weight lies
// in (low, high] where G(low) >= target > G(high).
//
// A Row says how its weights are held: total() of them, per_weight(), what one is multiplied by to
// give its share of the total in fixed point, over_visible(x), x over the number of weights,
// sum_above(threshold), and sum_and_neighbours(threshold), which costs more and usually ends the
// search when the threshold is near. It is worth its cost where at most Row::kFewWeights of the
// threshold's size can be left: sooner in registers than in memory, where all weights are read
// for it once more. No weight is above Row::kMostWeight.
template <typename Row>
__device__ Cut search_top_p(const Row& row, const RowRules& rules) {
  const uint32_t target = rules.target;
  // Weights up to here cannot make up what the target leaves, even with all sums rounded.
  const float floor = row.over_visible(((1.f - rules.top_p) * 0.999f - 2e-6f) * row.total());
  const auto fixed = [&](uint32_t bits) {
    return __float2uint_rn(__uint_as_float(bits) * row.per_weight());
  };
  Bracket bracket(fmaxf(floor, 0.f), Row::kMostWeight, rules.top_p);
  uint32_t above_low = static_cast<uint32_t>(kProbabilityOne);
  uint32_t above_high = 0;
#pragma unroll 1
  for (int pass = 0; bracket.open(); ++pass) {
    const uint32_t bits = bracket.next();
    const float threshold = __uint_as_float(bits);
    // Few weights are left, or many that are nearly equal: try the threshold's neighbours too.
    const bool close = pass >= 8 || static_cast<float>(above_low - above_high) <
                                        Row::kFewWeights * threshold * row.per_weight();
    Above found = {};
    if (close) {
      found = row.sum_and_neighbours(threshold);
    } else {
      found.sum = row.sum_above(threshold);
    }
    const auto [above, next_above, next_below] = found;
    const float probability = static_cast<float>(above) * (1.f / kProbabilityOne);
    if (above >= target) {
      if (close && above < target + fixed(next_above)) {
        return {__uint_as_float(next_above), kAllTies};
      }
      bracket.raise_low(close ? next_above - 1 : bits, probability);
      above_low = above;
    } else {
      if (close && above + fixed(next_below) >= target) {
        return {__uint_as_float(next_below), 1};
      }
      bracket.lower_high(close ? max(next_below, bracket.low() + 1) : bits, probability);
      above_high = above;
    }
  }
  // Equal weights: as many as the sum still lacks.
  const float weight = __uint_as_float(bracket.high());
  return {weight, count_ties(static_cast<double>(target) - above_high,
                             static_cast<double>(weight) * row.per_weight())};
}

// Either rule keeps a weight. No cut is under FLT_MIN: hidden keys weigh 0.
template <typename Row>
__device__ Cut find_cut(const Row& row, const RowRules& rules) {
  Cut cut = {INFINITY, kAllTies};
  if (rules.target > 0) {
    cut = search_top_p(row, rules);
  }
  const float least = rules.keep_above * row.total();
  if (least <= cut.weight) {
    cut = {least, kAllTies};
  }
  return {fmaxf(cut.weight, FLT_MIN), cut.ties};
}

}  // namespace prism
