// Instructions that CUDA C++ has no words for, a function each.
#pragma once

#include <cstdint>

namespace prism {

// In a kernel that may be launched with `overlaps` (launch.h): before it reads or overwrites
// anything of the kernels ahead.
__device__ inline void wait_for_producer() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In the kernel ahead: the next one may start as soon as every CTA came here and room is left. Call
// it behind wait_for_producer: then the next one may touch what neither of the two writes or reads
// before it waits itself, as lengths and the outputs of other calls.
__device__ inline void let_consumer_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// threadIdx.x, read anew: what it gives need not be kept in registers.
__device__ inline int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// Waits for `threads` threads at one of the CTA's 16 barriers, of which 0 is __syncthreads'.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Begins to copy 16 bytes, or 4, into shared memory.
template <int kBytes>
__device__ inline void copy_async(uint32_t target, const void* source) {
  static_assert(kBytes == 16 || kBytes == 4);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(source)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(target), "l"(source)
                 : "memory");
  }
}

// The first `bytes` of 16, and zeros behind them.
__device__ inline void copy_async_or_zeros(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

// The thread's copies since the last call become a group, which may be empty.
__device__ inline void group_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until all but the thread's latest kPending groups of copies have arrived.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four matrices of 8 x 8 halves; lane 8 j + c names row c of matrix j.
__device__ inline uint4 load_matrices(const uint4* row) {
  uint4 result;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "r"(shared_address(row))
               : "memory");
  return result;
}

// d += a b of float16: 16 rows, 8 columns, 16 dimensions.
__device__ inline void mma(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// One instruction each; without ftz every one of them costs a branch for subnormal numbers.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float log2_approximate(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float sqrt_approximate(float x) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// Unlike fmaxf, NaN if one of them is.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace prism
