// How pooling reads rows of tokens: 8 elements a thread, kWidth / 8 threads a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "kernels/common/type_list.h"
#include "kernels/params.h"

namespace prism {

constexpr int kVector = 8;  // elements a thread owns: 16 bytes, of fp8 8

enum class Rows {
  kWhole,      // kWidth elements, from a 16 byte boundary on
  kShort,      // up to kWidth elements, from a 16 byte boundary on
  kUnaligned,  // up to kWidth elements
};

template <int kWidth_, Rows kRows_>
struct RowShape {
  static constexpr int kWidth = kWidth_;
  static constexpr Rows kRows = kRows_;

  static bool fits(int head_dim, bool aligned) {
    return head_dim <= kWidth && (kRows == Rows::kUnaligned ||
                                  (aligned && (kRows == Rows::kShort || head_dim == kWidth)));
  }
  // For introspection.
  static std::string name() {
    return (kRows == Rows::kWhole ? "d" : "d up to ") + std::to_string(kWidth) +
           (kRows == Rows::kUnaligned ? ", unaligned" : "");
  }
};

// In the order of choice. There is no kWhole of 256: what it would save over kShort is a comparison
// a block.
template <int kWidth>
using RowsOfWidth = TypeList<RowShape<kWidth, Rows::kWhole>, RowShape<kWidth, Rows::kShort>,
                             RowShape<kWidth, Rows::kUnaligned>>;
using RowsOfAnyWidth = TypeList<RowShape<64, Rows::kWhole>, RowShape<64, Rows::kShort>,
                                RowShape<64, Rows::kUnaligned>, RowShape<128, Rows::kWhole>,
                                RowShape<128, Rows::kShort>, RowShape<128, Rows::kUnaligned>,
                                RowShape<256, Rows::kShort>, RowShape<256, Rows::kUnaligned>>;

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// float8 e4m3. As in attention/fp8.cuh: sign and magnitude in their places in a float, which is
// then 2^(127 - 7) too small; NaN codes become +-480 as there.
struct Fp8Code {
  int8_t code;
};

// What can be pooled into means, and its names.
template <typename Element>
struct ElementTraits;
template <>
struct ElementTraits<__nv_bfloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bf16";
};
template <>
struct ElementTraits<__half> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "fp16";
};
template <>
struct ElementTraits<Fp8Code> {
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr const char* kName = "fp8";
};
using Elements16 = TypeList<__nv_bfloat16, __half>;
using Elements = TypeList<__nv_bfloat16, __half, Fp8Code>;

// Calls `launch` with an element of that type.
template <typename List, typename Launch>
cudaError_t launch_dtype(DType dtype, Launch launch) {
  return List::launch_first(
      [&](auto element) { return ElementTraits<decltype(element)>::kDType == dtype; }, launch);
}

__device__ inline float to_float(Fp8Code x) {
  const uint32_t placed = static_cast<uint32_t>(int{x.code}) << 20 & 0x87f00000u;
  return __uint_as_float(placed) * 0x1p120f;
}

template <typename Element>
union Pack {
  using Raw = std::conditional_t<sizeof(Element) == 1, uint2, uint4>;
  Raw raw;
  Element element[kVector];
};

template <typename Element, Rows kRows>
__device__ Pack<Element> load(const Element* source) {
  Pack<Element> pack;
  if constexpr (kRows != Rows::kUnaligned) {
    pack.raw = __ldg(reinterpret_cast<const typename Pack<Element>::Raw*>(source));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      pack.element[i] = source[i];
    }
  }
  return pack;
}

// Of no row: zeros.
template <typename Element, Rows kRows>
__device__ Pack<Element> load_or_zeros(const Element* source) {
  Pack<Element> pack;
  pack.raw = {};
  return source == nullptr ? pack : load<Element, kRows>(source);
}

// What the means of a head of fp8 are multiplied by.
__device__ inline float mean_scale(const float* scale, int64_t head) {
  return scale == nullptr ? 1.f : __ldg(scale + head);
}

inline bool is_aligned(const TensorView& x) {
  const int64_t strides = x.batch_stride | x.head_stride | x.row_stride;
  return strides % kVector == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace prism
