// How pooling reads rows of tokens: 16 bytes a thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/params.h"

namespace prism {

constexpr int kVector = 8;  // elements a thread owns: 16 bytes

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Element>
union Pack {
  uint4 raw;
  Element element[kVector];
};

// kAligned: every row starts on 16 bytes, so one load fetches a thread's elements.
template <typename Element, bool kAligned>
__device__ Pack<Element> load(const Element* source) {
  Pack<Element> pack;
  if constexpr (kAligned) {
    pack.raw = __ldg(reinterpret_cast<const uint4*>(source));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      pack.element[i] = source[i];
    }
  }
  return pack;
}

inline bool is_aligned(const TensorView& x) {
  const int64_t strides = x.batch_stride | x.head_stride | x.row_stride;
  return strides % kVector == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace prism
