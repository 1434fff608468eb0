// The two launches of an estimation, for heads of up to kHeadDim dimensions.
#pragma once

#include <string>

#include "kernels/describe.h"
#include "kernels/grid/launch_grid.h"
#include "kernels/grid/pool_cells.cuh"
#include "kernels/grid/score_cells.cuh"

namespace prism {

constexpr int kMinGridCtas = 2;  // of an SM: one selects while the other scores

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, kMinGridCtas)
    score_cells_kernel(const __grid_constant__ EstimateGridParams params) {
  extern __shared__ uint4 smem[];
  GridCta<Shape> cta(params, *reinterpret_cast<typename Shape::Storage*>(smem));
  const SelectBlocksParams& select = params.select;
  const int64_t kv_heads = select.batch * select.kv_heads;
  const int cta_units = kCtaRows / (select.q_block_size / kCellTokens);
  const int64_t units = select.q_heads / select.kv_heads * select.q_blocks;
  const int64_t head_tiles = (units + cta_units - 1) / cta_units;
  wait_for_producer();
  // The longest first, and every other round in reverse, so that all CTAs end up with as much.
  const int64_t ctas = gridDim.x;
#pragma unroll 1
  for (int64_t round = 0; round * ctas < kv_heads * head_tiles; ++round) {
    const int64_t index = round * ctas + (round % 2 == 0 ? blockIdx.x : ctas - 1 - blockIdx.x);
    if (index < kv_heads * head_tiles) {
      const int64_t tile = head_tiles - 1 - index / kv_heads;
      cta.run(index % kv_heads, static_cast<int>(tile) * cta_units);
    }
  }
}

template <int kHeadDim>
cudaError_t launch_pool_cells(const EstimateGridParams& params, const GridWorkspace& workspace,
                              cudaStream_t stream) {
  const SelectBlocksParams& select = params.select;
  const auto task = [&](const TensorView& x, uint4* cells, float* factors, int64_t heads,
                        int64_t length) {
    const int64_t count = cells_of(length);
    return CellTask{x, cells, factors, heads, length, count, select.batch * heads * count};
  };
  const PoolCellsArguments arguments = {
      task(params.q, workspace.q_cells, workspace.q_factors, select.q_heads, select.q_len),
      task(params.k, workspace.k_cells, workspace.k_factors, select.kv_heads, select.k_len),
      params.scale, select.head_dim};
  constexpr int kCtaCells = kPoolThreads * kVector / kHeadDim;
  const int64_t grid = (arguments.q.count + arguments.k.count + kCtaCells - 1) / kCtaCells;
  const bool aligned = is_aligned(params.q) && is_aligned(params.k);
  const auto launch_as = [&](auto element) {
    using Element = decltype(element);
    const auto kernel = !aligned ? pool_cells_kernel<Element, kHeadDim, Rows::kUnaligned>
                        : select.head_dim == kHeadDim
                            ? pool_cells_kernel<Element, kHeadDim, Rows::kWhole>
                            : pool_cells_kernel<Element, kHeadDim, Rows::kShort>;
    return launch_kernel(kernel, {grid, kPoolThreads, 0}, stream, arguments);
  };
  return params.dtype == DType::kFloat16 ? launch_as(__half()) : launch_as(__nv_bfloat16());
}

template <typename Shape>
cudaError_t launch_score_cells(const EstimateGridParams& params, int64_t ctas, bool overlaps,
                               cudaStream_t stream) {
  const auto kernel = score_cells_kernel<Shape>;
  constexpr int kSmem = sizeof(typename Shape::Storage);
  // Set at every launch: the attribute belongs to the device, not to the process.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel(kernel, {ctas, Shape::kThreads, kSmem, overlaps}, stream, params);
}

template <int kHeadDim>
cudaError_t launch_grid(const EstimateGridParams& params, int64_t ctas, int sm,
                        cudaStream_t stream) {
  const cudaError_t error =
      launch_pool_cells<kHeadDim>(params, GridWorkspace(params, ctas), stream);
  if (error != cudaSuccess) {
    return error;
  }
  const bool overlaps = sm >= 90;
  return params.select.k_block_size == 64
             ? launch_score_cells<GridShape<kHeadDim, 4>>(params, ctas, overlaps, stream)
             : launch_score_cells<GridShape<kHeadDim, 8>>(params, ctas, overlaps, stream);
}

template <int kHeadDim>
void describe_grid(std::vector<KernelInfo>& kernels) {
  const std::string head_dim = "d up to " + std::to_string(kHeadDim);
  const auto add_score = [&](auto shape) {
    using Shape = decltype(shape);
    describe_kernel(kernels,
                    "score_cells<" + head_dim + ", key blocks of " +
                        std::to_string(Shape::kBlockCells * kCellTokens) + ">",
                    std::to_string(kCtaRows) + " query cells", score_cells_kernel<Shape>,
                    Shape::kThreads, static_cast<int>(sizeof(typename Shape::Storage)));
  };
  const auto add_pool = [&](const char* element, Rows rows, auto kernel) {
    describe_kernel(
        kernels, std::string("pool_cells<") + element + ", " + rows_name(kHeadDim, rows) + ">",
        std::to_string(kPoolThreads * kVector / kHeadDim) + " cells", kernel, kPoolThreads, 0);
  };
  add_pool("bf16", Rows::kWhole, pool_cells_kernel<__nv_bfloat16, kHeadDim, Rows::kWhole>);
  add_pool("bf16", Rows::kShort, pool_cells_kernel<__nv_bfloat16, kHeadDim, Rows::kShort>);
  add_pool("fp16", Rows::kWhole, pool_cells_kernel<__half, kHeadDim, Rows::kWhole>);
  add_pool("fp16", Rows::kShort, pool_cells_kernel<__half, kHeadDim, Rows::kShort>);
  add_score(GridShape<kHeadDim, 4>());
  add_score(GridShape<kHeadDim, 8>());
}

}  // namespace prism
