// Exact top-p over one row without a sort: probabilities become integers (fixed point, 2^31 = 1),
// whose sums do not depend on their order, and the smallest kept value is found by bisection.
#pragma once

#include <cstdint>

namespace prism {

constexpr float kFixedOne = 2147483648.f;  // 2^31

// The warps that work on one row: a whole warp, or all warps of the CTA in lockstep with the
// CTA's other rows (`warps` is the same for all of them).
struct RowWarps {
  int warps;  // warps that share this row
  int warp;   // this warp's index among them
  int lane;
  float* scratch;  // one float a warp, shared by the row's warps

  __device__ int threads() const { return warps * 32; }
  __device__ int thread() const { return warp * 32 + lane; }

  // Combines one value a thread; every thread of the row gets the result. The order is fixed.
  template <typename T, typename Combine>
  __device__ T reduce(T value, Combine combine) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    if (warps == 1) {
      return value;
    }
    static_assert(sizeof(T) == sizeof(float), "the scratch holds 4-byte values");
    T* shared = reinterpret_cast<T*>(scratch);
    __syncthreads();
    if (lane == 0) {
      shared[warp] = value;
    }
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < warps; ++i) {
      value = combine(value, shared[i]);
    }
    return value;
  }

  __device__ void sync() const {
    if (warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Which blocks of a row top-p keeps: those above `threshold`, and the first `ties` equal to it.
struct TopP {
  uint32_t threshold;
  uint32_t ties;
  bool keep_all;
};

// Softmax of row[0, visible) in place, as fixed point. False where no distribution exists: a NaN
// or +inf logit, or nothing but -inf.
__device__ inline bool softmax_to_fixed(float* row, int visible, const RowWarps& warps) {
  float maximum = -INFINITY;
  bool valid = true;
  for (int i = warps.thread(); i < visible; i += warps.threads()) {
    valid &= !isnan(row[i]);
    maximum = fmaxf(maximum, row[i]);
  }
  maximum = warps.reduce(maximum, [](float a, float b) { return fmaxf(a, b); });
  valid = warps.reduce(static_cast<int>(valid), [](int a, int b) { return a & b; }) != 0;
  valid &= isfinite(maximum);

  float sum = 0.f;
  for (int i = warps.thread(); i < visible; i += warps.threads()) {
    const float e = expf(row[i] - maximum);
    row[i] = e;
    sum += e;
  }
  sum = warps.reduce(sum, [](float a, float b) { return a + b; });
  const float inverse = kFixedOne / sum;
  for (int i = warps.thread(); i < visible; i += warps.threads()) {
    const uint32_t fixed = valid ? __float2uint_rn(row[i] * inverse) : 0u;
    reinterpret_cast<uint32_t*>(row)[i] = fixed;
  }
  warps.sync();
  return valid;
}

// Keep block i, in descending order, while the sum before it is under `top_p`. With G(t) the sum
// of the values above t, the smallest kept value is the smallest t with G(t) < target.
__device__ inline TopP find_top_p(const uint32_t* row, int visible, double top_p,
                                  const RowWarps& warps) {
  const auto add = [](uint32_t a, uint32_t b) { return a + b; };
  const auto sum_above = [&](uint32_t threshold) {
    uint32_t sum = 0;
    for (int i = warps.thread(); i < visible; i += warps.threads()) {
      sum += row[i] > threshold ? row[i] : 0u;
    }
    return warps.reduce(sum, add);
  };
  // Rounding can leave the total short of a top_p close to 1: no zero may be kept for that.
  const uint32_t total = sum_above(0);
  const uint32_t wanted = static_cast<uint32_t>(ceil(top_p * static_cast<double>(kFixedOne)));
  const uint32_t target = wanted < total ? wanted : total;
  // The largest value with G(value) >= target, bit by bit: rows that share a CTA's barriers take
  // the same number of steps whatever they hold.
  uint32_t below = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (sum_above(below | bit) >= target) {
      below |= bit;
    }
  }
  const uint32_t threshold = below + 1;
  const uint32_t above = sum_above(threshold);
  if (target == 0) {
    return {0xffffffffu, 0, false};
  }
  const uint32_t missing = target - above;
  return {threshold, (missing + threshold - 1) / threshold, false};
}

// ORs the kept blocks of row[0, visible) into `words`. For one warp.
__device__ inline void mark_kept(const uint32_t* row, int visible, TopP kept, uint32_t* words,
                                 int lane) {
  uint32_t ties_left = kept.ties;
  for (int base = 0; base < visible; base += 32) {
    const int i = base + lane;
    const uint32_t value = i < visible ? row[i] : 0u;
    const bool tied = i < visible && value == kept.threshold;
    const uint32_t ties = __ballot_sync(0xffffffffu, tied);
    const uint32_t rank = __popc(ties & ((1u << lane) - 1u));
    const bool keep =
        i < visible && (kept.keep_all || value > kept.threshold || (tied && rank < ties_left));
    const uint32_t word = __ballot_sync(0xffffffffu, keep);
    const uint32_t used = __popc(ties);
    ties_left -= used < ties_left ? used : ties_left;
    if (lane == 0) {
      words[base / 32] |= word;
    }
  }
}

}  // namespace prism
