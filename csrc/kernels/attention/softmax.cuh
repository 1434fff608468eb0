// Online softmax over accumulator fragments of mma.sync and wgmma, viewed as (row, column).
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

#include <cstdint>

#include "kernels/common/constants.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/params.h"

namespace prism {

// (MMA=4, M, N) accumulators as (rows = (2, M), columns = (2, N)).
template <typename Layout>
__device__ auto as_rows_and_columns(Layout layout) {
  using namespace cute;
  const auto split = logical_divide(layout, Shape<_2>{});  // ((2, 2), M, N)
  return make_layout(make_layout(get<0, 1>(split), get<1>(split)),
                     make_layout(get<0, 0>(split), get<2>(split)));
}

// (MMA=4, M, N) accumulators as the A operand of the next product: ((4, 2), M, N / 2).
template <typename Layout>
__device__ auto as_a_operand(Layout layout) {
  using namespace cute;
  const auto split = logical_divide(layout, Shape<Underscore, Underscore, _2>{});
  return make_layout(make_layout(get<0>(split), get<2, 0>(split)), get<1>(split), get<2, 1>(split));
}

// The same for wgmma: ((2, 2, N / 8), M, 1) accumulators as (rows = (2, M), columns = (2, N / 8)).
template <typename Layout>
__device__ auto wgmma_rows_and_columns(Layout layout) {
  using namespace cute;
  return make_layout(make_layout(get<0, 1>(layout), get<1>(layout)),
                     make_layout(get<0, 0>(layout), get<0, 2>(layout), get<2>(layout)));
}

// ((2, 2, N / 8), M, 1) accumulators as wgmma's A operand in registers: ((2, 2, 2), M, N / 16).
template <typename Layout>
__device__ auto wgmma_a_operand(Layout layout) {
  using namespace cute;
  const auto split = logical_divide(get<0>(layout), Shape<Underscore, Underscore, _2>{});
  return make_layout(make_layout(get<0>(split), get<1>(split), get<2, 0>(split)), get<1>(layout),
                     make_layout(get<2, 1>(split), get<2>(layout)));
}

// Four neighbouring threads hold one row.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Of cap_scores: its argument is twice that of tanh, for which see there.
PRISM_HOST_DEVICE inline float cap_factor(float scale, float softcap) {
  return 2.f * scale / softcap;
}

// Scores that are to be capped are tanh(scale * score / softcap) when they reach the softmax, and
// `softcap` is its scale.
PRISM_HOST_DEVICE inline float softmax_scale(float scale, float softcap) {
  return softcap > 0.f ? softcap : scale;
}

// Turns scores into tanh(factor / 2 * score). All lanes of a warp take part.
//
// The special function units are what the softmax waits for. So a warp whose scores are all below
// the cap, as most are, takes a polynomial instead, good to 2^-20 of the result. tanh.approx is
// only good to 2^-11: with a cap of 50 it is off by 1 % in the probability of a score of 20.
template <typename Scores>
__device__ __forceinline__ void cap_scores(Scores& scores, float factor) {
  using namespace cute;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < size(scores); ++i) {
    scores(i) *= factor;
    bits |= __float_as_uint(scores(i));
  }
  // Bit 30 is set in what is 2 or more, on either side, and in NaN.
  if (!__any_sync(kAllLanes, bits & 0x40000000u)) {
#pragma unroll
    for (int i = 0; i < size(scores); ++i) {
      // Minimax in relative error for tanh(x / 2) / x in terms of x^2 < 4.
      const float square = scores(i) * scores(i);
      float y = fmaf(square, -1.4975880e-06f, 3.2701395e-05f);
      y = fmaf(square, y, -4.0316931e-04f);
      y = fmaf(square, y, 4.1504479e-03f);
      y = fmaf(square, y, -4.1661303e-02f);
      y = fmaf(square, y, 4.9999970e-01f);
      scores(i) *= y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < size(scores); ++i) {
      // tanh(x / 2) = 1 - 2 / (1 + e^x), good to the last bits of 1.
      const float e = exp2_approximate(scores(i) * kLog2E);
      scores(i) = 1.f - __fdividef(2.f, 1.f + e);
    }
  }
}

// The running softmax of kRows rows a thread takes part in.
template <int kRows>
struct OnlineSoftmax {
  // The exponent that what was accumulated is relative to follows the maximum only when that has
  // grown by more than this in `update`: until then nothing has to be rescaled.
  static constexpr float kSlack = 8.f;

  float base[kRows];  // in units of log2; -inf: the row has seen no key
  float sum[kRows];   // of this thread's columns only, until finish()
  float scale_log2;   // softmax scale * log2(e)

  __device__ explicit OnlineSoftmax(float scale) {
    set_scale(scale);
    reset();
  }

  __device__ void set_scale(float scale) { scale_log2 = scale * kLog2E; }

  __device__ void reset() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      base[row] = -INFINITY;
      sum[row] = 0.f;
    }
  }

  // Turns scores into 2^(scale_log2 * score - base) in place. What was accumulated before has to
  // be multiplied by `correction`, if it returns true: some row of the warp got another base.
  // kMasked: scores of -inf may fill a row's part of this tile before it has seen any key.
  template <bool kMasked, typename Scores>
  __device__ __forceinline__ bool update(Scores& scores, float (&correction)[kRows]) {
    using namespace cute;
    bool changed = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float tile_max = scores(row, 0);
#pragma unroll
      for (int column = 1; column < size<1>(scores); ++column) {
        tile_max = fmaxf(tile_max, scores(row, column));
      }
      const float maximum = quad_max(tile_max) * scale_log2;
      const bool moved = maximum > base[row] + kSlack;
      const float previous = base[row];
      base[row] = moved ? maximum : previous;
      correction[row] = moved ? exp2_approximate(previous - maximum) : 1.f;
      changed |= moved;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      // A row that has seen nothing yet must not compute -inf - -inf.
      const float offset = kMasked && base[row] == -INFINITY ? 0.f : base[row];
      float tile_sum = 0.f;
#pragma unroll
      for (int column = 0; column < size<1>(scores); ++column) {
        const float p = exp2_approximate(scores(row, column) * scale_log2 - offset);
        scores(row, column) = p;
        tile_sum += p;
      }
      sum[row] = sum[row] * correction[row] + tile_sum;
    }
    return __any_sync(kAllLanes, changed);
  }

  // The usual case, in which the base may stay: turns scores into probabilities of type Element,
  // without a search for the maximum. Their sum tells afterwards whether one has outgrown the base
  // (or is NaN): then it returns false for the whole warp, and `update` has to do the work.
  template <typename Element, typename Scores, typename Probabilities>
  __device__ __forceinline__ bool try_update(const Scores& scores, Probabilities& probabilities) {
    using namespace cute;
    static_assert(kRows == 2, "scores hold pairs of two rows in turn");
    constexpr float kLimit = 32768.f;  // fits float16
    float tile_sum[kRows] = {};
    cutlass::NumericArrayConverter<Element, float, 2> convert;
#pragma unroll
    for (int i = 0; i < size(scores); i += 2) {
      const int row = i / 2 % kRows;
      cutlass::Array<float, 2> pair;
      asm volatile(
          "{ .reg .f32 x;\n"
          "fma.rn.ftz.f32 x, %3, %5, %6;\n"
          "ex2.approx.ftz.f32 %0, x;\n"
          "fma.rn.ftz.f32 x, %4, %5, %6;\n"
          "ex2.approx.ftz.f32 %1, x;\n"
          "add.ftz.f32 %2, %2, %0;\n"
          "add.ftz.f32 %2, %2, %1; }\n"
          : "=&f"(pair[0]), "=&f"(pair[1]), "+f"(tile_sum[row])
          : "f"(scores(i)), "f"(scores(i + 1)), "f"(scale_log2), "f"(-base[row]));
      *reinterpret_cast<cutlass::Array<Element, 2>*>(&probabilities(i)) = convert(pair);
    }
    const bool fits = tile_sum[0] <= kLimit && tile_sum[1] <= kLimit;
    if (!__all_sync(kAllLanes, fits)) {
      return false;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      sum[row] += tile_sum[row];
    }
    return true;
  }

  template <typename Output>
  __device__ __forceinline__ static void rescale(Output& output, const float (&correction)[kRows]) {
    using namespace cute;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int column = 0; column < size<1>(output); ++column) {
        output(row, column) *= correction[row];
      }
    }
  }

  // Normalizes the output of one row and returns its log-sum-exp: 0 and -inf for an empty row.
  // `sink` is one more logit of the denominator, without a value; -inf: none. The output is
  // multiplied by `value_scale`.
  template <typename Output>
  __device__ __forceinline__ float finish(Output& output, int row, float sink,
                                          float value_scale = 1.f) const {
    using namespace cute;
    const float sink_log2 = sink * kLog2E;
    float total = quad_sum(sum[row]);
    float exponent = base[row];
    float factor = 1.f;
    if (sink_log2 > -INFINITY) {
      exponent = fmaxf(exponent, sink_log2);
      factor = exp2_approximate(base[row] - exponent);
      total = total * factor + exp2_approximate(sink_log2 - exponent);
    }
    const float inverse = total == 0.f ? 0.f : factor / total * value_scale;
#pragma unroll
    for (int column = 0; column < size<1>(output); ++column) {
      output(row, column) *= inverse;
    }
    return total == 0.f ? -INFINITY : exponent * kLn2 + logf(total);
  }
};

}  // namespace prism
