// How pooling reads rows of tokens: 8 elements a thread, kWidth / 8 threads a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "kernels/params.h"

namespace prism {

constexpr int kVector = 8;  // elements a thread owns: 16 bytes, of fp8 8

enum class Rows {
  kWhole,      // kWidth elements, from a 16 byte boundary on
  kShort,      // up to kWidth elements, from a 16 byte boundary on
  kUnaligned,  // up to kWidth elements
};

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// float8 e4m3. As in attention/fp8.cuh: sign and magnitude in their places in a float, which is
// then 2^(127 - 7) too small.
struct Fp8Code {
  int8_t code;
};

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

// What the means of a head are multiplied by.
__device__ inline float mean_scale(const float* scale, int64_t head) {
  return scale == nullptr ? 1.f : __ldg(scale + head);
}

inline bool is_aligned(const TensorView& x) {
  const int64_t strides = x.batch_stride | x.head_stride | x.row_stride;
  return strides % kVector == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// For introspection.
inline std::string rows_name(int width, Rows rows) {
  return (rows == Rows::kWhole ? "d" : "d up to ") + std::to_string(width);
}

// Calls `launch` with the width and the Rows that fit, as integral constants. There is no kWhole of
// 256: what it would save over kShort is a comparison a block.
template <typename Launch>
cudaError_t launch_rows(int head_dim, bool aligned, Launch launch) {
  const auto launch_width = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth < kMaxHeadDim) {
      if (aligned && head_dim == kWidth) {
        return launch(width, std::integral_constant<Rows, Rows::kWhole>());
      }
    }
    return aligned ? launch(width, std::integral_constant<Rows, Rows::kShort>())
                   : launch(width, std::integral_constant<Rows, Rows::kUnaligned>());
  };
  switch (estimation_width(head_dim)) {
    case 64:
      return launch_width(std::integral_constant<int, 64>());
    case 128:
      return launch_width(std::integral_constant<int, 128>());
    default:
      return launch_width(std::integral_constant<int, 256>());
  }
}

}  // namespace prism
