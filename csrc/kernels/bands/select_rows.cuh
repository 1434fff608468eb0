// Which kernel takes rows of a length, and its launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "kernels/bands/long_rows.cuh"
#include "kernels/bands/select_rows.h"
#include "kernels/bands/short_rows.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/type_list.h"
#include "kernels/describe.h"

namespace prism {

// Rows of up to 256 key blocks: a warp a row, since such launches are short of rows, not of warps.
template <int kHeadDim>
using ShortestRows = ShortRowsShape<kHeadDim, 1, 16, 8>;
// Up to 1,024: fewer warps a row, so that several CTAs fit; where scores of 32 rows fit as well,
// they halve the reads of the keys. At 256 dimensions no room is left for those.
constexpr int64_t kWideFrom = 513;  // key blocks
template <int kHeadDim>
using WideRows = ShortRowsShape<kHeadDim, 2, 16, kMaxShortWords>;
template <int kHeadDim>
using NarrowRows = ShortRowsShape<kHeadDim, 1, 8, kMaxShortWords>;
// Longer rows: 64 at a time (32 of 256 dimensions), or 16 where a launch has too few of them for
// all multiprocessors.
template <int kHeadDim>
using ManyLongRows = LongRowsShape<kHeadDim, kHeadDim <= 128 ? 4 : 2, 16>;
template <int kHeadDim>
using FewLongRows = LongRowsShape<kHeadDim, 1, 16>;

// In the order of choice.
template <int kHeadDim>
using RowsShapes =
    std::conditional_t<kHeadDim <= 128,
                       TypeList<ShortestRows<kHeadDim>, WideRows<kHeadDim>, NarrowRows<kHeadDim>,
                                ManyLongRows<kHeadDim>, FewLongRows<kHeadDim>>,
                       TypeList<ShortestRows<kHeadDim>, NarrowRows<kHeadDim>,
                                ManyLongRows<kHeadDim>, FewLongRows<kHeadDim>>>;

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinCtas)
    select_rows_kernel(const __grid_constant__ BandsArguments arguments) {
  extern __shared__ uint4 smem[];
  typename Shape::Rows rows(arguments, *reinterpret_cast<typename Shape::Storage*>(smem));
  wait_for_producer();
  rows.run();
}

// What the choice depends on.
struct Gpu {
  int smem = 0;  // bytes of a CTA
  int multiprocessors = 0;

  cudaError_t ask() {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    return error;
  }
};

template <typename Shape>
bool rows_fit(const SelectParams& params, const Gpu& gpu) {
  constexpr int kHeadDim = Shape::kHeadDim;
  if constexpr (std::is_same_v<Shape, FewLongRows<kHeadDim>>) {
    return true;
  } else if constexpr (std::is_same_v<Shape, ManyLongRows<kHeadDim>>) {
    return Shape::tiles(params) > gpu.multiprocessors / 2;
  } else {
    return params.k_blocks <= Shape::kWords * 32 && Shape::smem_bytes(params) <= gpu.smem &&
           (Shape::kRowTiles == 1 || params.k_blocks >= kWideFrom);
  }
}

// Calls f(Shape(), CTAs) with the shape of this call's rows.
template <int kHeadDim, typename F>
cudaError_t with_rows_shape(const SelectParams& params, F f) {
  Gpu gpu;
  const cudaError_t error = gpu.ask();
  if (error != cudaSuccess) {
    return error;
  }
  return RowsShapes<kHeadDim>::launch_first(
      [&](auto shape) { return rows_fit<decltype(shape)>(params, gpu); },
      [&](auto shape) {
        const int64_t tiles = decltype(shape)::tiles(params);
        return f(shape,
                 decltype(shape)::kLong ? std::min<int64_t>(tiles, gpu.multiprocessors) : tiles);
      });
}

template <int kHeadDim>
cudaError_t count_strip_rows(const SelectParams& params, int64_t* rows) {
  return with_rows_shape<kHeadDim>(params, [&](auto shape, int64_t ctas) {
    *rows = decltype(shape)::kLong ? ctas * decltype(shape)::kRows : 0;
    return cudaSuccess;
  });
}

template <int kHeadDim>
cudaError_t launch_select_rows(const BandsParams& params, int sm, cudaStream_t stream) {
  const BandsArguments arguments(params, /*strip_rows=*/0);
  return with_rows_shape<kHeadDim>(params.select, [&](auto shape, int64_t ctas) {
    using Shape = decltype(shape);
    // CTAs of long rows draw numbers beyond the last.
    if (Shape::kLong && Shape::tiles(params.select) > INT32_MAX - ctas) {
      return cudaErrorInvalidConfiguration;
    }
    const auto kernel = select_rows_kernel<Shape>;
    const int smem = Shape::smem_bytes(params.select);
    // Set at every launch: the attribute belongs to the device, not to the process.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    return error != cudaSuccess
               ? error
               : launch_kernel(kernel, {ctas, Shape::kThreads, smem, can_overlap(sm)}, stream,
                               arguments);
  });
}

template <int kHeadDim>
void describe_select_rows(std::vector<KernelInfo>& kernels) {
  RowsShapes<kHeadDim>::for_each([&](auto shape) {
    using Shape = decltype(shape);
    SelectParams longest = {};
    longest.k_blocks = Shape::kWords * 32;
    const std::string rows = std::to_string(Shape::kRows);
    describe_kernel(kernels,
                    std::string(Shape::kLong ? "select_long_rows" : "select_short_rows") +
                        "<d up to " + std::to_string(kHeadDim) + ", rows " + rows +
                        (Shape::kLong ? ">" : ", up to " + std::to_string(longest.k_blocks) + ">"),
                    rows + " query rows", select_rows_kernel<Shape>, Shape::kThreads,
                    Shape::smem_bytes(longest));
  });
}

}  // namespace prism
