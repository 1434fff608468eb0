// float8 e4m3 (1 sign bit, 4 exponent bits of bias 7, 3 mantissa bits) to 16-bit elements, exactly
// and on every GPU: the cvt instructions for it start with sm_89 and know no bfloat16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <type_traits>

#include "kernels/params.h"

namespace prism {

// Where an e4m3 code lands in a 16-bit element: its magnitude `kShift` bits up, under the sign. The
// element is then too small by the power of two in which the exponent biases differ. A subnormal
// code is a subnormal element, which the multiplication makes normal. NaN codes become +-480.
template <typename Element>
struct Fp8Format {
  static constexpr bool kIsHalf = std::is_same_v<Element, cutlass::half_t>;
  static constexpr int kShift = kIsHalf ? 7 : 4;  // 10 or 7 mantissa bits
  static constexpr uint32_t kMask = 0x8000u | 0x7fu << kShift;
  static constexpr uint32_t kScale = kIsHalf ? 0x5c00u : 0x7b80u;  // 2^(15 - 7) or 2^(127 - 7)
};

// Two codes, each sign-extended to 16 bits, as a pair of elements that is still to be scaled.
template <typename Element>
PRISM_HOST_DEVICE constexpr uint32_t place_fp8_pair(uint32_t extended) {
  using Format = Fp8Format<Element>;
  return extended << Format::kShift & (Format::kMask << 16 | Format::kMask);
}

template <typename Element>
__device__ __forceinline__ uint32_t scale_fp8_pair(uint32_t placed) {
  constexpr uint32_t kScale = Fp8Format<Element>::kScale << 16 | Fp8Format<Element>::kScale;
  uint32_t scaled;
  if constexpr (Fp8Format<Element>::kIsHalf) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(scaled) : "r"(placed), "r"(kScale));
  } else {
    // sm_80 has no mul.bf16x2. Adding -0 leaves the sign of a zero alone.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(scaled)
        : "r"(placed), "r"(kScale), "r"(0x80008000u));
  }
  return scaled;
}

// Codes 2 kPair and 2 kPair + 1 of four, each sign-extended to 16 bits.
template <int kPair>
__device__ __forceinline__ uint32_t extend_fp8_pair(uint32_t codes) {
  // Selector 8 + i repeats the sign of byte i. __byte_perm knows no such selectors.
  uint32_t extended;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(extended) : "r"(codes), "n"(kPair == 0 ? 0x9180 : 0xb3a2));
  return extended;
}

// Four codes in order.
template <typename Element>
__device__ __forceinline__ uint2 convert_fp8(uint32_t codes) {
  const uint32_t low = place_fp8_pair<Element>(extend_fp8_pair<0>(codes));
  const uint32_t high = place_fp8_pair<Element>(extend_fp8_pair<1>(codes));
  return {scale_fp8_pair<Element>(low), scale_fp8_pair<Element>(high)};
}

// Eight codes in order.
template <typename Element>
__device__ __forceinline__ uint4 convert_fp8(uint32_t first, uint32_t second) {
  const uint2 a = convert_fp8<Element>(first);
  const uint2 b = convert_fp8<Element>(second);
  return {a.x, a.y, b.x, b.y};
}

}  // namespace prism
