// Exact top-p over one row without a sort. A row's weights e = exp(score - maximum) stay where
// they were computed, spread over the CTA (or cluster); this is the state of the search for the
// lowest weight to keep, driven by sums over all weights above a threshold that the row proposes.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/select/interpolate.cuh"

namespace prism {

constexpr int kCandidates = 16;  // few enough to rank by comparing all pairs: one a lane

struct Candidate {
  float weight;
  int key;
};

// What a row keeps: weights above `weight`, and those equal to it up to key block `key`.
struct Cut {
  float weight;
  int key;
};

__device__ inline Cut keep_nothing() { return {INFINITY, -1}; }

// Keep block i, in descending order of weight (ties: lower index first), while the sum before it is
// under top_p of the total. With G(t) the sum of the weights above t, the lowest kept weight lies
// in (low, high] where G(low) >= target > G(high).
class RowSearch {
 public:
  __device__ void none() { *this = RowSearch(); }

  // `visible` weights, none above 1, sum to `total`.
  __device__ void begin(double top_p, double keep_above, float total, int visible) {
    none();
    least_ = static_cast<float>(keep_above * total);
    if (top_p == 0.0) {
      return;
    }
    // However small top_p is, the largest weight is kept: nothing comes before it.
    target_ = fmaxf(static_cast<float>(top_p * total), FLT_MIN);
    active_ = true;
    // Weights up to `floor` cannot make up what the target leaves, even with all sums rounded.
    const float floor = ((total - target_) * 0.999f - total * 2e-6f) / static_cast<float>(visible);
    bracket_ = Bracket(fmaxf(floor, 0.f), 2.f, static_cast<float>(top_p));
    per_weight_ = 1.f / total;
    above_ = 0.f;
    count_low_ = visible;
    count_high_ = 0;
    last_key_ = visible - 1;
  }

  __device__ bool searching() const {
    return active_ && candidates() > kCandidates && bracket_.open();
  }
  __device__ float threshold() const { return __uint_as_float(bracket_.next()); }
  // The sum and number of the weights above threshold().
  __device__ void narrow(float sum, int count) {
    const uint32_t bits = bracket_.next();
    if (sum >= target_) {
      bracket_.raise_low(bits, sum * per_weight_);
      count_low_ = count;
    } else {
      bracket_.lower_high(bits, sum * per_weight_);
      above_ = sum;
      count_high_ = count;
    }
  }

  // More equal weights than fit a list: the last key to keep is found by halving as well.
  __device__ bool tied() const { return active_ && !searching() && candidates() > kCandidates; }
  __device__ bool searching_ties() const { return tied() && last_key_ - first_key_ > 1; }
  __device__ Cut tie_threshold() const {
    return {__uint_as_float(bracket_.high()), first_key_ + (last_key_ - first_key_) / 2};
  }
  // The number of weights that equal tie_threshold().weight up to its key.
  __device__ void narrow_ties(int count) {
    const int middle = first_key_ + (last_key_ - first_key_) / 2;
    const double missing = static_cast<double>(target_) - above_;
    if (count * static_cast<double>(__uint_as_float(bracket_.high())) >= missing) {
      last_key_ = middle;
    } else {
      first_key_ = middle;
    }
  }

  // Bits of the bounds of what has to be listed: low < weight <= high. Nothing where low = high.
  __device__ uint2 listed() const {
    return active_ && !tied() ? uint2{bracket_.low(), bracket_.high()} : uint2{0, 0};
  }

  // The row's cut, from a list of its candidates in any order, one a lane of the half warp that
  // owns the row (weight 0 where there is none). Fixed point makes their sums independent of order.
  __device__ Cut finish(Candidate mine) const {
    constexpr float kOne = 0x1p58f;  // times kCandidates still fits 64 bits
    const uint64_t fixed = __float2ull_rz(mine.weight * kOne);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      const float weight = __shfl_sync(0xffffffffu, mine.weight, i, kCandidates);
      const int key = __shfl_sync(0xffffffffu, mine.key, i, kCandidates);
      const uint64_t add = __shfl_sync(0xffffffffu, fixed, i, kCandidates);
      const bool first = weight > mine.weight || (weight == mine.weight && key < mine.key);
      sum += first ? add : 0;
    }
    const double before = above_ + static_cast<double>(sum) * (1.0 / kOne);
    const bool kept = mine.weight > 0.f && before < static_cast<double>(target_);
    float lowest = kept ? mine.weight : INFINITY;
#pragma unroll
    for (int offset = kCandidates / 2; offset > 0; offset /= 2) {
      lowest = fminf(lowest, __shfl_xor_sync(0xffffffffu, lowest, offset));
    }
    int last = kept && mine.weight == lowest ? mine.key : -1;
#pragma unroll
    for (int offset = kCandidates / 2; offset > 0; offset /= 2) {
      last = max(last, __shfl_xor_sync(0xffffffffu, last, offset));
    }
    Cut cut = keep_nothing();
    if (active_) {
      cut = tied() || last < 0 ? Cut{__uint_as_float(bracket_.high()), tied() ? last_key_ : -1}
                               : Cut{lowest, last};
    }
    // All keys are visible up to here, and hidden ones weigh 0.
    return least_ <= cut.weight ? Cut{fmaxf(least_, FLT_MIN), INT32_MAX / 2} : cut;
  }

 private:
  __device__ int candidates() const { return count_low_ - count_high_; }

  bool active_ = false;
  float target_ = 0.f;
  float above_ = 0.f;  // G(high)
  Bracket bracket_;
  float per_weight_ = 0.f;  // 1 / total
  float least_ = INFINITY;  // weights from here on are kept whatever their rank
  int count_low_ = 0;       // weights above low, or a bound of their number
  int count_high_ = 0;
  int first_key_ = -1;  // too few ties up to here
  int last_key_ = -1;   // enough up to here
};

}  // namespace prism
