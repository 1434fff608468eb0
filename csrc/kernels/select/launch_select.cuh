// How many CTAs share a row, and what of each GPU they use.
#pragma once

#include <string>

#include "kernels/describe.h"
#include "kernels/launch.h"
#include "kernels/select/launch_select.h"
#include "kernels/select/select_cta.cuh"

namespace prism {

constexpr int kDeepStages = 4;     // where shared memory is large: 9.0 and 10.0
constexpr int kShallowStages = 2;  // fits the 99 KB that every supported GPU offers
constexpr int kPortableCluster = 8;

template <int kHeadDim, int kCluster, int kStages>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_blocks_kernel(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ uint4 smem[];
  auto& shared = *reinterpret_cast<SharedStorage<kHeadDim, kCluster, kStages>*>(smem);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kSupported = kCluster == 1;
#else
  constexpr bool kSupported = true;
#endif
  if constexpr (kSupported) {
    wait_for_producer();
    SelectCta<kHeadDim, kCluster, kStages>(params, shared).run();
  }
}
template <int kHeadDim, int kCluster, int kStages>
cudaError_t launch_select_kernel(const SelectBlocksParams& params, bool overlaps,
                                 cudaStream_t stream) {
  const auto kernel = select_blocks_kernel<kHeadDim, kCluster, kStages>;
  constexpr int kSmem = sizeof(SharedStorage<kHeadDim, kCluster, kStages>);
  // Set at every launch: the attributes belong to the device, not to the process.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
  if (error == cudaSuccess && kCluster > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t rows = params.q_heads / params.kv_heads * params.q_blocks;
  const int64_t tiles = (rows + kRows - 1) / kRows * params.kv_heads * params.batch;
  return launch_kernel(kernel, {tiles * kCluster, kSelectThreads, kSmem, kCluster, overlaps},
                       stream, params);
}

// Whether the device can hold a cluster above the size that all can.
template <int kHeadDim, int kCluster>
bool fits_cluster() {
  const auto kernel = select_blocks_kernel<kHeadDim, kCluster, kDeepStages>;
  constexpr int kSmem = sizeof(SharedStorage<kHeadDim, kCluster, kDeepStages>);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem) !=
          cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kSelectThreads);
  config.dynamicSmemBytes = kSmem;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return clusters > 0;
}

template <int kHeadDim>
cudaError_t launch_select(const SelectBlocksParams& params, int sm, cudaStream_t stream) {
  int device = 0;
  int smem = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  constexpr int kLargest = sizeof(SharedStorage<kHeadDim, 16, kDeepStages>);
  if (sm < 90 || smem < kLargest) {
    return launch_select_kernel<kHeadDim, 1, kShallowStages>(params, sm >= 90, stream);
  }
  const int64_t segments = (params.k_blocks + kSegmentWords * 32 - 1) / (kSegmentWords * 32);
  if (segments <= 1) {
    return launch_select_kernel<kHeadDim, 1, kDeepStages>(params, true, stream);
  }
  if (segments <= 2) {
    return launch_select_kernel<kHeadDim, 2, kDeepStages>(params, true, stream);
  }
  if (segments <= 4) {
    return launch_select_kernel<kHeadDim, 4, kDeepStages>(params, true, stream);
  }
  if (segments > 8 && fits_cluster<kHeadDim, 16>()) {
    return launch_select_kernel<kHeadDim, 16, kDeepStages>(params, true, stream);
  }
  return launch_select_kernel<kHeadDim, kPortableCluster, kDeepStages>(params, true, stream);
}

template <int kHeadDim>
void describe_select(std::vector<KernelInfo>& kernels) {
  const std::string name = "select_blocks<d" + std::to_string(kHeadDim);
  const auto add = [&](auto cluster, auto stages) {
    constexpr int kCluster = decltype(cluster)::value;
    constexpr int kStages = decltype(stages)::value;
    describe_kernel(kernels,
                    name + ", cluster " + std::to_string(kCluster) + ", stages " +
                        std::to_string(kStages) + ">",
                    "32 query rows", select_blocks_kernel<kHeadDim, kCluster, kStages>,
                    kSelectThreads, sizeof(SharedStorage<kHeadDim, kCluster, kStages>));
  };
  add(std::integral_constant<int, 1>(), std::integral_constant<int, kShallowStages>());
  add(std::integral_constant<int, 1>(), std::integral_constant<int, kDeepStages>());
}

}  // namespace prism
