// How rows are shared among warps, CTAs and clusters, and what of each GPU they use.
#pragma once

#include <string>

#include "kernels/describe.h"
#include "kernels/launch.h"
#include "kernels/select/launch_select.h"
#include "kernels/select/select_cta.cuh"
#include "kernels/select/short_rows.cuh"

namespace prism {

constexpr int kDeepStages = 4;     // where shared memory is large: 9.0 and 10.0
constexpr int kShallowStages = 2;  // fits the 99 KB that every supported GPU offers
constexpr int kPortableCluster = 8;

// Rows of up to 256 key blocks: a warp a row, since such launches are short of rows, not of warps.
// Up to 1,024: fewer warps a row, so that several CTAs fit; where scores of 32 rows fit as well,
// they halve the reads of the keys.
template <int kHeadDim>
using ShortestRows = ShortRowsShape<kHeadDim, 1, 16, 8>;
template <int kHeadDim>
using NarrowRows = ShortRowsShape<kHeadDim, 1, 8, kMaxShortWords>;
template <int kHeadDim>
using WideRows = ShortRowsShape<kHeadDim, 2, 16, kMaxShortWords>;
constexpr int64_t kWideFrom = 513;  // key blocks

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinCtas)
    select_short_rows_kernel(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ uint4 smem[];
  ShortRows<Shape> rows(params, *reinterpret_cast<typename Shape::Storage*>(smem));
  wait_for_producer();
  rows.run();
}

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
    SelectCta<kHeadDim, kCluster, kStages> cta(params, shared);
    wait_for_producer();
    cta.run();
  }
}

template <typename Shape>
cudaError_t launch_short_rows(const SelectBlocksParams& params, bool overlaps,
                              cudaStream_t stream) {
  const auto kernel = select_short_rows_kernel<Shape>;
  const int smem = Shape::smem_bytes(params.k_blocks);
  // Set at every launch: the attributes belong to the device, not to the process.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t rows = params.q_heads / params.kv_heads * params.q_blocks;
  const int64_t tiles = (rows + Shape::kRows - 1) / Shape::kRows * params.kv_heads * params.batch;
  return launch_kernel(kernel, {tiles, Shape::kThreads, smem, 1, overlaps}, stream, params);
}

template <int kHeadDim, int kCluster, int kStages>
cudaError_t launch_select_kernel(const SelectBlocksParams& params, bool overlaps,
                                 cudaStream_t stream) {
  const auto kernel = select_blocks_kernel<kHeadDim, kCluster, kStages>;
  constexpr int kSmem = sizeof(SharedStorage<kHeadDim, kCluster, kStages>);
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
  const bool overlaps = sm >= 90;
  const auto is_short = [&](auto shape) {
    return params.k_blocks <= decltype(shape)::kWords * 32 &&
           decltype(shape)::smem_bytes(params.k_blocks) <= smem;
  };
  if (is_short(ShortestRows<kHeadDim>())) {
    return launch_short_rows<ShortestRows<kHeadDim>>(params, overlaps, stream);
  }
  if (params.k_blocks >= kWideFrom && is_short(WideRows<kHeadDim>())) {
    return launch_short_rows<WideRows<kHeadDim>>(params, overlaps, stream);
  }
  if (is_short(NarrowRows<kHeadDim>())) {
    return launch_short_rows<NarrowRows<kHeadDim>>(params, overlaps, stream);
  }
  constexpr int kLargest = sizeof(SharedStorage<kHeadDim, 16, kDeepStages>);
  if (sm < 90 || smem < kLargest) {
    return launch_select_kernel<kHeadDim, 1, kShallowStages>(params, overlaps, stream);
  }
  const int64_t segments = (params.k_blocks + kSegmentWords * 32 - 1) / (kSegmentWords * 32);
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
  const std::string head_dim = "d" + std::to_string(kHeadDim);
  const auto add_short = [&](auto shape) {
    using Shape = decltype(shape);
    describe_kernel(kernels,
                    "select_short_rows<" + head_dim + ", rows " + std::to_string(Shape::kRows) +
                        ", up to " + std::to_string(Shape::kWords * 32) + ">",
                    std::to_string(Shape::kRows) + " query rows", select_short_rows_kernel<Shape>,
                    Shape::kThreads, Shape::smem_bytes(Shape::kWords * 32));
  };
  add_short(ShortestRows<kHeadDim>());
  add_short(NarrowRows<kHeadDim>());
  add_short(WideRows<kHeadDim>());
  const auto add = [&](auto cluster, auto stages) {
    constexpr int kCluster = decltype(cluster)::value;
    constexpr int kStages = decltype(stages)::value;
    describe_kernel(kernels,
                    "select_blocks<" + head_dim + ", cluster " + std::to_string(kCluster) +
                        ", stages " + std::to_string(kStages) + ">",
                    "32 query rows", select_blocks_kernel<kHeadDim, kCluster, kStages>,
                    kSelectThreads, sizeof(SharedStorage<kHeadDim, kCluster, kStages>));
  };
  add(std::integral_constant<int, 1>(), std::integral_constant<int, kShallowStages>());
}

}  // namespace prism
