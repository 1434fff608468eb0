// Online softmax over accumulator fragments of mma.sync and wgmma, viewed as (row, column).
#pragma once

#include <cute/tensor.hpp>

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
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The running maximum (of unscaled scores) and sum of kRows rows a thread takes part in.
template <int kRows>
struct OnlineSoftmax {
  float maximum[kRows];
  float sum[kRows];  // of this thread's columns only, until finish()
  float scale_log2;  // softmax scale * log2(e)

  __device__ explicit OnlineSoftmax(float scale) : scale_log2(scale * 1.4426950408889634f) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      maximum[row] = -INFINITY;
      sum[row] = 0.f;
    }
  }

  // Turns scores into exp(scale * (score - maximum)) in place. What was accumulated before has to
  // be multiplied by `correction`; true if any row of the warp changes by that.
  template <typename Scores>
  __device__ bool update(Scores& scores, float (&correction)[kRows]) {
    using namespace cute;
    bool changed = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float tile_max = scores(row, 0);
#pragma unroll
      for (int column = 1; column < size<1>(scores); ++column) {
        tile_max = fmaxf(tile_max, scores(row, column));
      }
      const float previous = maximum[row];
      maximum[row] = fmaxf(previous, quad_max(tile_max));
      // A row that has seen nothing yet must not compute -inf - -inf.
      const float base = maximum[row] == -INFINITY ? 0.f : maximum[row] * scale_log2;
      correction[row] = exp2f(previous * scale_log2 - base);
      changed |= correction[row] != 1.f;
      float tile_sum = 0.f;
#pragma unroll
      for (int column = 0; column < size<1>(scores); ++column) {
        const float p = exp2f(scores(row, column) * scale_log2 - base);
        scores(row, column) = p;
        tile_sum += p;
      }
      sum[row] = sum[row] * correction[row] + tile_sum;
    }
    return __any_sync(0xffffffffu, changed);
  }

  template <typename Output>
  __device__ static void rescale(Output& output, const float (&correction)[kRows]) {
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
  template <typename Output>
  __device__ float finish(Output& output, int row) const {
    using namespace cute;
    const float total = quad_sum(sum[row]);
    const float inverse = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
    for (int column = 0; column < size<1>(output); ++column) {
      output(row, column) *= inverse;
    }
    constexpr float kLn2 = 0.6931471805599453f;
    return total == 0.f ? -INFINITY : maximum[row] * scale_log2 * kLn2 + logf(total);
  }
};

}  // namespace prism
