// Which kernel takes rows of a length, and its launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels/describe.h"
#include "kernels/launch.h"
#include "kernels/select/launch_select.h"
#include "kernels/select/long_rows.cuh"
#include "kernels/select/short_rows.cuh"

namespace prism {

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
template <int kHeadDim>
constexpr bool kHasWide = kHeadDim <= 128;  // else no room is left for the scores of 1,024 keys
// Longer rows: 64 at a time (32 of 256 dimensions), or 16 where a launch has too few of them for
// all multiprocessors.
template <int kHeadDim>
using ManyLongRows = LongRowsShape<kHeadDim, kHeadDim <= 128 ? 4 : 2, 16>;
template <int kHeadDim>
using FewLongRows = LongRowsShape<kHeadDim, 1, 16>;

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinCtas)
    select_short_rows_kernel(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ uint4 smem[];
  ShortRows<Shape> rows(params, *reinterpret_cast<typename Shape::Storage*>(smem));
  wait_for_producer();
  rows.run();
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    select_long_rows_kernel(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ uint4 smem[];
  LongRows<Shape> rows(params, *reinterpret_cast<typename Shape::Storage*>(smem));
  wait_for_producer();
  rows.run();
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
  return launch_kernel(kernel, {tiles, Shape::kThreads, smem, overlaps}, stream, params);
}

template <typename Shape>
cudaError_t launch_long_rows(const SelectBlocksParams& params, int64_t ctas, bool overlaps,
                             cudaStream_t stream) {
  const auto kernel = select_long_rows_kernel<Shape>;
  constexpr int kSmem = sizeof(typename Shape::Storage);
  static_assert(kSmem <= 99 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
  if (error != cudaSuccess) {
    return error;
  }
  if (Shape::tiles(params) > INT32_MAX - ctas) {  // CTAs draw numbers beyond the last
    return cudaErrorInvalidConfiguration;
  }
  return launch_kernel(kernel, {ctas, Shape::kThreads, kSmem, overlaps}, stream, params);
}

enum class SelectKernel { kShortest, kNarrow, kWide, kFewLong, kManyLong };

struct SelectPlan {
  SelectKernel kernel;
  int64_t ctas;        // of long rows
  int64_t strip_rows;  // over all of them
};

template <int kHeadDim>
cudaError_t plan_select(const SelectBlocksParams& params, SelectPlan* plan) {
  int device = 0;
  int smem = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const auto is_short = [&](auto shape) {
    return params.k_blocks <= decltype(shape)::kWords * 32 &&
           decltype(shape)::smem_bytes(params.k_blocks) <= smem;
  };
  const auto set_long = [&](SelectKernel kernel, auto shape) {
    const int64_t ctas = std::min<int64_t>(decltype(shape)::tiles(params), multiprocessors);
    *plan = {kernel, ctas, ctas * decltype(shape)::kRows};
  };
  if (is_short(ShortestRows<kHeadDim>())) {
    *plan = {SelectKernel::kShortest, 0, 0};
  } else if (kHasWide<kHeadDim> && params.k_blocks >= kWideFrom && is_short(WideRows<kHeadDim>())) {
    *plan = {SelectKernel::kWide, 0, 0};
  } else if (is_short(NarrowRows<kHeadDim>())) {
    *plan = {SelectKernel::kNarrow, 0, 0};
  } else if (ManyLongRows<kHeadDim>::tiles(params) > multiprocessors / 2) {
    set_long(SelectKernel::kManyLong, ManyLongRows<kHeadDim>());
  } else {
    set_long(SelectKernel::kFewLong, FewLongRows<kHeadDim>());
  }
  return cudaSuccess;
}

template <int kHeadDim>
cudaError_t select_bytes(const SelectBlocksParams& params, int64_t* bytes) {
  SelectPlan plan;
  const cudaError_t error = plan_select<kHeadDim>(params, &plan);
  if (error == cudaSuccess) {
    *bytes = SelectWorkspace::bytes(params, plan.strip_rows);
  }
  return error;
}

template <int kHeadDim>
cudaError_t launch_select(const SelectBlocksParams& params, int sm, cudaStream_t stream) {
  SelectPlan plan;
  const cudaError_t error = plan_select<kHeadDim>(params, &plan);
  if (error != cudaSuccess) {
    return error;
  }
  const bool overlaps = can_overlap(sm);
  switch (plan.kernel) {
    case SelectKernel::kShortest:
      return launch_short_rows<ShortestRows<kHeadDim>>(params, overlaps, stream);
    case SelectKernel::kNarrow:
      return launch_short_rows<NarrowRows<kHeadDim>>(params, overlaps, stream);
    case SelectKernel::kWide:
      if constexpr (kHasWide<kHeadDim>) {
        return launch_short_rows<WideRows<kHeadDim>>(params, overlaps, stream);
      }
      break;
    case SelectKernel::kFewLong:
      return launch_long_rows<FewLongRows<kHeadDim>>(params, plan.ctas, overlaps, stream);
    case SelectKernel::kManyLong:
      return launch_long_rows<ManyLongRows<kHeadDim>>(params, plan.ctas, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

template <int kHeadDim>
void describe_select(std::vector<KernelInfo>& kernels) {
  const std::string head_dim = "d up to " + std::to_string(kHeadDim);
  const auto add = [&](const char* name, auto kernel, int rows, int threads, int smem,
                       const std::string& length) {
    describe_kernel(
        kernels,
        std::string(name) + "<" + head_dim + ", rows " + std::to_string(rows) + length + ">",
        std::to_string(rows) + " query rows", kernel, threads, smem);
  };
  const auto add_short = [&](auto shape) {
    using Shape = decltype(shape);
    add("select_short_rows", select_short_rows_kernel<Shape>, Shape::kRows, Shape::kThreads,
        Shape::smem_bytes(Shape::kWords * 32), ", up to " + std::to_string(Shape::kWords * 32));
  };
  const auto add_long = [&](auto shape) {
    using Shape = decltype(shape);
    add("select_long_rows", select_long_rows_kernel<Shape>, Shape::kRows, Shape::kThreads,
        static_cast<int>(sizeof(typename Shape::Storage)), "");
  };
  add_short(ShortestRows<kHeadDim>());
  add_short(NarrowRows<kHeadDim>());
  if constexpr (kHasWide<kHeadDim>) {
    add_short(WideRows<kHeadDim>());
  }
  add_long(FewLongRows<kHeadDim>());
  add_long(ManyLongRows<kHeadDim>());
}

}  // namespace prism
