// Where to look next for the lowest weight to keep.
#pragma once

#include <cstdint>

#include "kernels/common/ptx.cuh"

namespace prism {

// Log odds of a probability: against the logarithm of a threshold, the probability above it is
// nearly a line wherever logits have a bell's shape. The offset keeps 0 and 1 finite.
__device__ inline float log_odds(float probability) {
  constexpr float kOffset = 1e-3f;
  return log2_approximate(probability + kOffset) - log2_approximate(1.f - probability + kOffset);
}

// A search between the bits of two positive floats. Bits have the order of the floats and are
// nearly their logarithm, so that halving between them takes few steps at any magnitude.
// Interpolates with the Illinois rule: an end that stays while the other moves twice counts half,
// so that the next step lands on its side.
class Bracket {
 public:
  Bracket() = default;

  // The wanted threshold lies in [low, high): the probability above it is `target`.
  __device__ Bracket(float low, float high, float target) {
    low_ = __float_as_uint(low);
    high_ = __float_as_uint(high);
    target_odds_ = log_odds(target);
    low_excess_ = log_odds(1.f) - target_odds_;
    high_excess_ = log_odds(0.f) - target_odds_;
  }

  __device__ uint32_t low() const { return low_; }
  __device__ uint32_t high() const { return high_; }
  __device__ bool open() const { return high_ - low_ > 1; }

  // Strictly between low and high: interpolated, or the middle after three steps that left more
  // than half.
  __device__ uint32_t next() const {
    const uint32_t width = high_ - low_;
    if (slow_ == kSlow) {
      return low_ + width / 2;
    }
    const float part = low_excess_ * reciprocal_approximate(low_excess_ - high_excess_);
    // Negated so that a NaN ends in the middle.
    const float inside = !(part > 0.f && part < 1.f) ? 0.5f : part;
    const auto step = static_cast<uint32_t>(inside * static_cast<float>(width));
    return low_ + min(max(step, 1u), width - 1);
  }

  // `probability`, that above `bits`, is at least the target: for raise_low. Under it: lower_high.
  __device__ void raise_low(uint32_t bits, float probability) {
    narrowed(high_ - bits);
    low_ = bits;
    low_excess_ = log_odds(probability) - target_odds_;
    high_excess_ *= moved_ == kLow ? 0.5f : 1.f;
    moved_ = kLow;
  }
  __device__ void lower_high(uint32_t bits, float probability) {
    narrowed(bits - low_);
    high_ = bits;
    high_excess_ = log_odds(probability) - target_odds_;
    low_excess_ *= moved_ == kHigh ? 0.5f : 1.f;
    moved_ = kHigh;
  }

 private:
  enum Moved { kNone, kLow, kHigh };
  static constexpr int kSlow = 3;

  __device__ void narrowed(uint32_t width) {
    slow_ = width > (high_ - low_) / 2 && slow_ < kSlow ? slow_ + 1 : 0;
  }

  uint32_t low_ = 0;
  uint32_t high_ = 0;
  float target_odds_ = 0.f;
  float low_excess_ = 0.f;  // log odds at the ends, above the target's
  float high_excess_ = 0.f;
  int slow_ = 0;
  Moved moved_ = kNone;
};

}  // namespace prism
