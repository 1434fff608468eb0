#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "kernels/describe.h"
#include "kernels/pool/block_pool.h"

namespace prism {

namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // elements a thread owns: 16 bytes

__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

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

// One CTA a block: kHeadDim / 8 threads span a row, the others take rows in parallel; their
// partial sums meet in shared memory in a fixed order.
template <typename Element, int kHeadDim, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    block_pool_kernel(const __grid_constant__ BlockPoolParams params) {
  constexpr int kRowThreads = kHeadDim / kVector;
  constexpr int kRowGroups = kThreads / kRowThreads;
  __shared__ float partial[kRowGroups][kHeadDim];

  const int64_t blocks = (params.length + params.block_size - 1) / params.block_size;
  const int64_t block = blockIdx.x % blocks;
  const int64_t head = blockIdx.x / blocks % params.heads;
  const int64_t batch = blockIdx.x / blocks / params.heads;
  const int lane = threadIdx.x % kRowThreads;
  const int group = threadIdx.x / kRowThreads;
  const int64_t first_row = block * params.block_size;
  const int64_t left = params.length - first_row;
  const int rows = static_cast<int>(left < params.block_size ? left : params.block_size);

  const Element* source = static_cast<const Element*>(params.x.data) +
                          batch * params.x.batch_stride + head * params.x.head_stride +
                          first_row * params.x.row_stride + lane * kVector;
  float sum[kVector] = {};
#pragma unroll 4
  for (int row = group; row < rows; row += kRowGroups) {
    const Pack<Element> pack = load<Element, kAligned>(source + row * params.x.row_stride);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum[i] += to_float(pack.element[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    partial[group][lane * kVector + i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x < kHeadDim) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
      total += partial[i][threadIdx.x];
    }
    params.means[static_cast<int64_t>(blockIdx.x) * kHeadDim + threadIdx.x] =
        total / static_cast<float>(rows);
  }
}

template <typename Element, int kHeadDim>
cudaError_t launch(const BlockPoolParams& params, cudaStream_t stream) {
  const int64_t strides = params.x.batch_stride | params.x.head_stride | params.x.row_stride;
  const bool aligned =
      strides % kVector == 0 && reinterpret_cast<uintptr_t>(params.x.data) % 16 == 0;
  const int64_t blocks = (params.length + params.block_size - 1) / params.block_size;
  const int64_t grid_size = blocks * params.heads * params.batch;
  if (grid_size > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  const unsigned grid = static_cast<unsigned>(grid_size);
  if (aligned) {
    block_pool_kernel<Element, kHeadDim, true><<<grid, kThreads, 0, stream>>>(params);
  } else {
    block_pool_kernel<Element, kHeadDim, false><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_head_dim(const BlockPoolParams& params, cudaStream_t stream) {
  switch (params.head_dim) {
    case 64:
      return launch<Element, 64>(params, stream);
    case 128:
      return launch<Element, 128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_block_pool(const BlockPoolParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.heads == 0 || params.length == 0) {
    return cudaSuccess;
  }
  return params.dtype == DType::kFloat16 ? launch_head_dim<__half>(params, stream)
                                         : launch_head_dim<__nv_bfloat16>(params, stream);
}

void describe_block_pool(std::vector<KernelInfo>& kernels) {
  const char* tile = "one block of tokens";
  describe_kernel(kernels, "block_pool<bf16, d64>", tile,
                  block_pool_kernel<__nv_bfloat16, 64, true>, kThreads, 0);
  describe_kernel(kernels, "block_pool<bf16, d128>", tile,
                  block_pool_kernel<__nv_bfloat16, 128, true>, kThreads, 0);
  describe_kernel(kernels, "block_pool<fp16, d64>", tile, block_pool_kernel<__half, 64, true>,
                  kThreads, 0);
  describe_kernel(kernels, "block_pool<fp16, d128>", tile, block_pool_kernel<__half, 128, true>,
                  kThreads, 0);
}

}  // namespace prism
