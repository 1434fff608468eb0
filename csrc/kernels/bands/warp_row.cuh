// Exact top-p over one row that a warp, or a group of warps, holds in registers: value j of a lane
// is key 32 j + lane of its warp's part, so that a ballot over value j is word j of the mask.
#pragma once

#include <cstdint>

#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/keep/row_range.cuh"
#include "kernels/keep/top_p.cuh"
#include "kernels/keep/warp_team.cuh"

namespace prism {

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
    row.visible_ = visible;
    if (!row.weigh(scale)) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = range_bits(i * 32 + lane_index(), 0, part);
      }
      return;
    }
    row.mark(find_cut(row, rules), words);
  }

  // For search_top_p.
  static constexpr float kFewWeights = 32.f;
  static constexpr float kMostWeight = 1.f;

  __device__ float total() const { return total_; }
  __device__ float per_weight() const { return per_weight_; }
  __device__ float over_visible(float x) const {
    return x * reciprocal_approximate(static_cast<float>(visible_));
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

 private:
  __device__ explicit WarpRow(Team& team) : team_(team) {}

  template <typename Load>
  __device__ void load(Load load, int part) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      x_[j] = -INFINITY;
      if (j * 32 + lane_index() < part) {
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

  __device__ void mark(const Cut& cut, uint32_t (&words)[kWords]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = 0;
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const uint32_t kept = __ballot_sync(kAllLanes, x_[j] >= cut.weight);
      words[j / 32] = lane_index() == j % 32 ? kept : words[j / 32];
    }
    if (cut.ties == kAllTies) {
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
      uint32_t dropped = __ballot_sync(kAllLanes, x_[j] == weight);
#pragma unroll 1
      for (; left > 0 && dropped != 0; --left) {
        dropped &= dropped - 1;
      }
      words[j / 32] &= lane_index() == j % 32 ? ~dropped : ~0u;
    }
  }

  Team& team_;
  float x_[kValues];  // scores, then weights; hidden keys -inf, then 0
  float total_;
  float per_weight_;  // what a weight is multiplied by to give a probability in fixed point
  int visible_;       // keys, in all parts
};

}  // namespace prism
