// The two launches of an estimation, for heads of up to kHeadDim dimensions.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/common/launch.h"
#include "kernels/common/load_rows.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/type_list.h"
#include "kernels/describe.h"
#include "kernels/grid/launch_grid.h"
#include "kernels/grid/pool_cells.cuh"
#include "kernels/grid/score_cells.cuh"

namespace prism {

constexpr int kMinGridCtas = 2;  // of an SM: one selects while the other scores

template <typename Cta>
__device__ void run_ragged(Cta& cta, const GridParams& params, GridTile& tile) {
  clear_past_ends(params.select);  // nothing that pooling touches
  if (threadIdx.x == 0) {
    tile.search = SequenceSearch();
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
    score_cells_kernel(const __grid_constant__ GridParams params) {
  extern __shared__ uint4 smem[];
  auto& shared = *reinterpret_cast<typename Shape::Storage*>(smem);
  GridCta<Shape> cta(params, shared);
  const SelectParams& select = params.select;
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

// In the order of choice. Key blocks of 64 and of 128 tokens.
template <int kHeadDim>
using GridShapes = TypeList<GridShape<kHeadDim, 4, false>, GridShape<kHeadDim, 8, false>,
                            GridShape<kHeadDim, 4, true>, GridShape<kHeadDim, 8, true>>;

inline CellTask cell_task(const TensorView& x, const CellStats& cells, int64_t batch, int64_t heads,
                          int64_t first_cell, int64_t cells_of_head, int64_t length) {
  return {x,
          cells,
          length,
          first_cell,
          static_cast<uint32_t>(heads),
          static_cast<uint32_t>(cells_of_head),
          static_cast<uint32_t>(batch * heads * cells_of_head)};
}

template <int kHeadDim, bool kRagged>
cudaError_t launch_pool_tasks(const PoolCellsArguments& arguments, DType dtype,
                              cudaStream_t stream) {
  constexpr int kCtaCells = kCellThreads * kVector / kHeadDim;
  const int64_t count = int64_t{arguments.q.count} + arguments.k.count;
  const auto task_aligned = [](const CellTask& task) {
    return task.count == 0 || is_aligned(task.x);
  };
  const bool aligned = task_aligned(arguments.q) && task_aligned(arguments.k);
  return launch_dtype<Elements16>(dtype, [&](auto element) {
    return RowsOfWidth<kHeadDim>::launch_first(
        [&](auto rows) { return rows.fits(arguments.head_dim, aligned); },
        [&](auto rows) {
          return launch_kernel(pool_cells_kernel<decltype(element), decltype(rows), kRagged>,
                               {(count + kCtaCells - 1) / kCtaCells, kCellThreads, 0}, stream,
                               arguments);
        });
  });
}

// 512 bytes each at least: more would not fit any GPU.
inline bool too_many_cells(int64_t q_cells, int64_t k_cells) {
  return q_cells + k_cells > INT32_MAX;
}

template <int kHeadDim>
cudaError_t launch_pool_cells(const PoolCellsParams& params, cudaStream_t stream) {
  const int64_t cells = cells_of(params.length);
  if (too_many_cells(0, params.batch * params.heads * cells)) {
    return cudaErrorInvalidConfiguration;
  }
  PoolCellsArguments arguments = {};
  arguments.k = cell_task(params.x, params.cells, params.batch, params.heads, params.first_cell,
                          cells, params.length);
  arguments.scale = 1.f;
  arguments.head_dim = params.head_dim;
  return launch_pool_tasks<kHeadDim, false>(arguments, params.dtype, stream);
}

template <int kHeadDim>
cudaError_t launch_grid(const GridParams& params, int64_t ctas, int sm, cudaStream_t stream) {
  const SelectParams& select = params.select;
  const bool ragged = select.ragged.is_ragged();
  const int64_t batch = ragged ? 1 : select.batch;  // of the cells
  const GridWorkspace workspace(params, ctas, ragged);
  const int64_t q_cells = workspace.q.factor_head_stride;  // of a head
  const bool pools_keys = params.k_cells.vectors == nullptr;
  const int64_t k_cells = pools_keys ? workspace.k.factor_head_stride : 0;
  if (too_many_cells(batch * select.q_heads * q_cells, batch * select.kv_heads * k_cells)) {
    return cudaErrorInvalidConfiguration;
  }
  PoolCellsArguments pool = {};
  pool.q = cell_task(params.q, workspace.q, batch, select.q_heads, 0, q_cells, select.q_len);
  if (pools_keys) {
    pool.k = cell_task(params.k, workspace.k, batch, select.kv_heads, 0, k_cells, select.k_len);
  }
  pool.scale = params.scale;
  pool.head_dim = select.head_dim;
  pool.ragged = select.ragged;
  pool.batch = static_cast<int>(select.batch);
  pool.tile_counter = workspace.tile_counter;
  const cudaError_t error = ragged ? launch_pool_tasks<kHeadDim, true>(pool, params.dtype, stream)
                                   : launch_pool_tasks<kHeadDim, false>(pool, params.dtype, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return GridShapes<kHeadDim>::launch_first(
      [&](auto shape) {
        return shape.kRagged == ragged && shape.kBlockCells * kCellTokens == select.k_block_size;
      },
      [&](auto shape) {
        using Shape = decltype(shape);
        const auto kernel = score_cells_kernel<Shape>;
        constexpr int kSmem = sizeof(typename Shape::Storage);
        // Set at every launch: the attribute belongs to the device, not to the process.
        const cudaError_t attribute_error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem);
        if (attribute_error != cudaSuccess) {
          return attribute_error;
        }
        return launch_kernel(kernel, {ctas, Shape::kThreads, kSmem, can_overlap(sm)}, stream,
                             params);
      });
}

template <int kHeadDim, bool kRagged>
void describe_pool_cells(std::vector<KernelInfo>& kernels) {
  Elements16::for_each([&](auto element) {
    RowsOfWidth<kHeadDim>::for_each([&](auto rows) {
      using Element = decltype(element);
      describe_kernel(kernels,
                      std::string(kRagged ? "pool_cells_ragged<" : "pool_cells<") +
                          ElementTraits<Element>::kName + ", " + rows.name() + ">",
                      std::to_string(kCellThreads * kVector / kHeadDim) + " cells",
                      pool_cells_kernel<Element, decltype(rows), kRagged>, kCellThreads, 0);
    });
  });
}

template <int kHeadDim>
void describe_grid(std::vector<KernelInfo>& kernels) {
  describe_pool_cells<kHeadDim, false>(kernels);
  describe_pool_cells<kHeadDim, true>(kernels);
  GridShapes<kHeadDim>::for_each([&](auto shape) {
    using Shape = decltype(shape);
    describe_kernel(kernels,
                    std::string(Shape::kRagged ? "score_cells_ragged<" : "score_cells<") +
                        "d up to " + std::to_string(kHeadDim) + ", key blocks of " +
                        std::to_string(Shape::kBlockCells * kCellTokens) + ">",
                    std::to_string(kCtaRows) + " query cells", score_cells_kernel<Shape>,
                    Shape::kThreads, static_cast<int>(sizeof(typename Shape::Storage)));
  });
}

}  // namespace prism
