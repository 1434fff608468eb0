// The two launches of an estimation, for heads of up to kHeadDim dimensions.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/describe.h"
#include "kernels/grid/launch_grid.h"
#include "kernels/grid/pool_cells.cuh"
#include "kernels/grid/score_cells.cuh"

namespace prism {

constexpr int kMinGridCtas = 2;  // of an SM: one selects while the other scores

template <typename Cta>
__device__ void run_ragged(Cta& cta, const EstimateGridParams& params, GridTile& tile) {
  clear_past_ends(params.select);
  if (threadIdx.x == 0) {
    tile.passed_sequences = 0;
    tile.passed_tiles = 0;
  }
  __syncthreads();
  wait_for_producer();
  while (true) {
    if (threadIdx.x < 32) {
      draw_tile(params.select, GridWorkspace(params, gridDim.x, true).tile_counter, tile);
    }
    __syncthreads();
    if (tile.extent.units == 0) {
      return;
    }
    cta.run(tile.kv_head, tile.first_unit);  // ends with a barrier
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, kMinGridCtas)
    score_cells_kernel(const __grid_constant__ EstimateGridParams params) {
  extern __shared__ uint4 smem[];
  auto& shared = *reinterpret_cast<typename Shape::Storage*>(smem);
  GridCta<Shape> cta(params, shared);
  const SelectBlocksParams& select = params.select;
  if constexpr (Shape::kRagged) {
    run_ragged(cta, params, shared.tile);
    return;
  }
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

inline CellTask cell_task(const TensorView& x, const CellStats& cells, int64_t batch, int64_t heads,
                          int64_t first_cell, int64_t length) {
  const int64_t count = cells_of(length);
  return {x, cells, heads, length, first_cell, count, batch * heads * count};
}

inline CellTask ragged_task(const TensorView& x, const CellStats& cells, int64_t heads,
                            int64_t longest) {
  const int64_t cells_of_head = cells.factor_head_stride;
  return {x, cells, heads, longest, 0, cells_of_head, heads * cells_of_head};
}

template <int kHeadDim, bool kRagged>
cudaError_t launch_pool_tasks(const PoolCellsArguments& arguments, DType dtype,
                              cudaStream_t stream) {
  constexpr int kCtaCells = kPoolThreads * kVector / kHeadDim;
  const int64_t grid = (arguments.q.count + arguments.k.count + kCtaCells - 1) / kCtaCells;
  const auto task_aligned = [](const CellTask& task) {
    return task.count == 0 || is_aligned(task.x);
  };
  const bool aligned = task_aligned(arguments.q) && task_aligned(arguments.k);
  const auto launch_as = [&](auto element) {
    using Element = decltype(element);
    const auto kernel = !aligned ? pool_cells_kernel<Element, kHeadDim, Rows::kUnaligned, kRagged>
                        : arguments.head_dim == kHeadDim
                            ? pool_cells_kernel<Element, kHeadDim, Rows::kWhole, kRagged>
                            : pool_cells_kernel<Element, kHeadDim, Rows::kShort, kRagged>;
    return launch_kernel(kernel, {grid, kPoolThreads, 0}, stream, arguments);
  };
  return dtype == DType::kFloat16 ? launch_as(__half()) : launch_as(__nv_bfloat16());
}

template <int kHeadDim>
cudaError_t launch_pool_cells(const PoolCellsParams& params, cudaStream_t stream) {
  PoolCellsArguments arguments = {};
  arguments.k = cell_task(params.x, params.cells, params.batch, params.heads, params.first_cell,
                          params.length);
  arguments.scale = 1.f;
  arguments.head_dim = params.head_dim;
  return launch_pool_tasks<kHeadDim, false>(arguments, params.dtype, stream);
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

template <int kHeadDim, bool kRagged>
cudaError_t launch_grid_kernels(const EstimateGridParams& params, int64_t ctas, int sm,
                                cudaStream_t stream) {
  const SelectBlocksParams& select = params.select;
  const GridWorkspace workspace(params, ctas, kRagged);
  PoolCellsArguments pool = {};
  if constexpr (kRagged) {
    pool.q = ragged_task(params.q, workspace.q, select.q_heads, select.q_len);
    pool.k = ragged_task(params.k, workspace.k, select.kv_heads, select.k_len);
    pool.ragged = select.ragged;
    pool.batch = static_cast<int>(select.batch);
    pool.tile_counter = workspace.tile_counter;
  } else {
    pool.q = cell_task(params.q, workspace.q, select.batch, select.q_heads, 0, select.q_len);
    if (params.k_cells.vectors == nullptr) {
      pool.k = cell_task(params.k, workspace.k, select.batch, select.kv_heads, 0, select.k_len);
    }
  }
  pool.scale = params.scale;
  pool.head_dim = select.head_dim;
  const cudaError_t error = launch_pool_tasks<kHeadDim, kRagged>(pool, params.dtype, stream);
  if (error != cudaSuccess) {
    return error;
  }
  const bool overlaps = can_overlap(sm);
  return select.k_block_size == 64
             ? launch_score_cells<GridShape<kHeadDim, 4, kRagged>>(params, ctas, overlaps, stream)
             : launch_score_cells<GridShape<kHeadDim, 8, kRagged>>(params, ctas, overlaps, stream);
}

template <int kHeadDim>
cudaError_t launch_grid(const EstimateGridParams& params, int64_t ctas, int sm,
                        cudaStream_t stream) {
  return params.select.ragged.is_ragged()
             ? launch_grid_kernels<kHeadDim, true>(params, ctas, sm, stream)
             : launch_grid_kernels<kHeadDim, false>(params, ctas, sm, stream);
}

template <int kHeadDim, bool kRagged>
void describe_grid_kernels(std::vector<KernelInfo>& kernels) {
  const std::string head_dim = "d up to " + std::to_string(kHeadDim);
  const std::string suffix = kRagged ? "_ragged<" : "<";
  const auto add_score = [&](auto shape) {
    using Shape = decltype(shape);
    describe_kernel(kernels,
                    "score_cells" + suffix + head_dim + ", key blocks of " +
                        std::to_string(Shape::kBlockCells * kCellTokens) + ">",
                    std::to_string(kCtaRows) + " query cells", score_cells_kernel<Shape>,
                    Shape::kThreads, static_cast<int>(sizeof(typename Shape::Storage)));
  };
  const auto add_pool = [&](const char* element, Rows rows, auto kernel) {
    describe_kernel(
        kernels, "pool_cells" + suffix + element + ", " + rows_name(kHeadDim, rows) + ">",
        std::to_string(kPoolThreads * kVector / kHeadDim) + " cells", kernel, kPoolThreads, 0);
  };
  add_pool("bf16", Rows::kWhole, pool_cells_kernel<__nv_bfloat16, kHeadDim, Rows::kWhole, kRagged>);
  add_pool("bf16", Rows::kShort, pool_cells_kernel<__nv_bfloat16, kHeadDim, Rows::kShort, kRagged>);
  add_pool("fp16", Rows::kWhole, pool_cells_kernel<__half, kHeadDim, Rows::kWhole, kRagged>);
  add_pool("fp16", Rows::kShort, pool_cells_kernel<__half, kHeadDim, Rows::kShort, kRagged>);
  add_score(GridShape<kHeadDim, 4, kRagged>());
  add_score(GridShape<kHeadDim, 8, kRagged>());
}

template <int kHeadDim>
void describe_grid(std::vector<KernelInfo>& kernels) {
  describe_grid_kernels<kHeadDim, false>(kernels);
  describe_grid_kernels<kHeadDim, true>(kernels);
}

}  // namespace prism
