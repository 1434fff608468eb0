// Exact top-p over one row without a sort. A row's weights e = exp(score - maximum) stay where
// they were computed, spread over the CTA (or cluster); this is the state of the search for the
// lowest weight to keep, driven by sums over all weights above a threshold that the row proposes.
#pragma once

#include <cfloat>
#include <cstdint>

namespace prism {

constexpr int kCandidates = 16;  // few enough to rank by comparing all pairs: one a lane

__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

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
// in (low, high] where G(low) >= target > G(high). Weights are positive floats: their bits, as
// integers, have the same order, and halving between bits takes few steps at any magnitude.
class RowSearch {
 public:
  __device__ void none() { *this = RowSearch(); }

  // `visible` weights, none above 1, sum to `total`.
  __device__ void begin(double top_p, float total, int visible) {
    none();
    if (top_p == 0.0) {
      return;
    }
    // However small top_p is, the largest weight is kept: nothing comes before it.
    target_ = fmaxf(static_cast<float>(top_p * total), FLT_MIN);
    active_ = true;
    // Weights up to `floor` cannot make up what the target leaves, even with all sums rounded.
    const float floor = ((total - target_) * 0.999f - total * 2e-6f) / static_cast<float>(visible);
    low_ = __float_as_uint(fmaxf(floor, 0.f));
    high_ = __float_as_uint(2.f);
    above_ = 0.f;
    count_low_ = visible;
    count_high_ = 0;
    last_key_ = visible - 1;
  }

  __device__ bool searching() const {
    return active_ && candidates() > kCandidates && high_ - low_ > 1;
  }
  __device__ float threshold() const { return __uint_as_float(low_ + (high_ - low_) / 2); }
  // The sum and number of the weights above threshold().
  __device__ void narrow(float sum, int count) {
    const uint32_t middle = low_ + (high_ - low_) / 2;
    if (sum >= target_) {
      low_ = middle;
      count_low_ = count;
    } else {
      high_ = middle;
      above_ = sum;
      count_high_ = count;
    }
  }

  // More equal weights than fit a list: the last key to keep is found by halving as well.
  __device__ bool tied() const { return active_ && !searching() && candidates() > kCandidates; }
  __device__ bool searching_ties() const { return tied() && last_key_ - first_key_ > 1; }
  __device__ Cut tie_threshold() const {
    return {__uint_as_float(high_), first_key_ + (last_key_ - first_key_) / 2};
  }
  // The number of weights that equal tie_threshold().weight up to its key.
  __device__ void narrow_ties(int count) {
    const int middle = first_key_ + (last_key_ - first_key_) / 2;
    const double missing = static_cast<double>(target_) - above_;
    if (count * static_cast<double>(__uint_as_float(high_)) >= missing) {
      last_key_ = middle;
    } else {
      first_key_ = middle;
    }
  }

  // Bits of the bounds of what has to be listed: low < weight <= high. Nothing where low = high.
  __device__ uint2 listed() const { return active_ && !tied() ? uint2{low_, high_} : uint2{0, 0}; }

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
    if (!active_) {
      return keep_nothing();
    }
    if (tied()) {
      return {__uint_as_float(high_), last_key_};
    }
    return last < 0 ? Cut{__uint_as_float(high_), -1} : Cut{lowest, last};
  }

 private:
  __device__ int candidates() const { return count_low_ - count_high_; }

  bool active_ = false;
  float target_ = 0.f;
  float above_ = 0.f;  // G(high)
  uint32_t low_ = 0;
  uint32_t high_ = 0;
  int count_low_ = 0;  // weights above low, or a bound of their number
  int count_high_ = 0;
  int first_key_ = -1;  // too few ties up to here
  int last_key_ = -1;   // enough up to here
};

}  // namespace prism
