// Powers of two that bring vectors into float16's range.
#pragma once

#include <cstdint>

namespace prism {

constexpr int kHalfExponent = 13;  // the largest element is brought near 2^13

// The power of two that brings `largest` (finite, >= 0) into [2^13, 2^14), and its inverse.
struct HalfScale {
  float scale;
  float inverse;

  __device__ explicit HalfScale(float largest) {
    // Below 2^-100 the scale itself would overflow; what is that small scores 0 anyway.
    const int exponent = max(__float_as_int(largest) >> 23, 127 - 100);
    scale = __int_as_float((2 * 127 + kHalfExponent - exponent) << 23);
    inverse = __int_as_float((exponent - kHalfExponent) << 23);
  }
};

}  // namespace prism
