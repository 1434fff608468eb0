// Means over blocks of tokens, and of the means what selection needs.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "kernels/bands/emit_means.cuh"
#include "kernels/bands/pool_blocks.h"
#include "kernels/common/batch.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/load_rows.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/describe.h"

namespace prism {

constexpr int kPoolThreads = 32 * kEmitWarps;

// CTAs of a multiprocessor. With eight loads a thread in flight, 6 cover its bandwidth.
constexpr int min_pool_ctas(Rows rows, PoolMode mode) {
  return mode == PoolMode::kMeans      ? 8
         : mode == PoolMode::kEnergies ? 6
         : rows == Rows::kUnaligned    ? 4
                                       : 5;
}

// What a CTA reads of a sequence: shape, and where its rows lie.
struct PoolSource {
  PoolShape shape;
  int64_t offset;  // of the first row, in elements; of pages 0
  bool paged;
};

template <PoolMode kMode>
__device__ PoolSource find_source(const PoolArguments& arguments, const PoolTask& task,
                                  int sequence) {
  if constexpr (kMode == PoolMode::kRagged) {
    const RaggedBatch& ragged = arguments.ragged;
    const int longest = static_cast<int>(task.shape.length);
    const Span span =
        task.is_key ? k_span(ragged, sequence, longest) : q_span(ragged, sequence, longest);
    return {energy_shape(span.length, task.block_size), span.start * task.x.row_stride,
            task.is_key && ragged.is_paged()};
  } else {
    return {task.shape, sequence * task.x.batch_stride, false};
  }
}

// kWidth / 8 threads span a row, the others take rows in parallel. Their partial sums meet in
// shared memory, where the warps finish blocks in turn while the others load the next block.
template <typename Element, typename Shape, PoolMode kMode>
__global__ void __launch_bounds__(kPoolThreads, min_pool_ctas(Shape::kRows, kMode))
    pool_blocks_kernel(const __grid_constant__ PoolArguments arguments, const int64_t first_grid) {
  constexpr int kWidth = Shape::kWidth;
  constexpr Rows kRows = Shape::kRows;
  constexpr bool kEstimate = kMode != PoolMode::kMeans;
  constexpr bool kRagged = kMode == PoolMode::kRagged;
  constexpr int kRowThreads = kWidth / kVector;
  constexpr int kRowGroups = kPoolThreads / kRowThreads;
  // As many loads in flight as a thread has rows in the smallest block, up to eight.
  constexpr int kLoads = kWidth < 128 ? kWidth / 16 : 8;
  constexpr int kQuads = sizeof(LaneMean<kWidth>) / sizeof(float4);
  __shared__ float4 partial[2][kRowGroups][kWidth / 4];

  wait_for_producer();
  let_consumer_start();
  const bool second = blockIdx.x >= first_grid;
  const PoolTask& task = arguments.tasks[second];
  // Grids have 31 bits, whose divisions are much cheaper than those of 64.
  const uint32_t index = blockIdx.x - (second ? static_cast<uint32_t>(first_grid) : 0u);
  const int chunk = static_cast<int>(index % static_cast<uint32_t>(task.ctas));
  const uint32_t head = index / static_cast<uint32_t>(task.ctas);  // over the batch
  const auto sequence = [&] { return static_cast<int>(head / static_cast<uint32_t>(task.heads)); };
  const auto own_head = [&] { return static_cast<int>(head % static_cast<uint32_t>(task.heads)); };
  const BandsWorkspace& workspace = arguments.workspace;
  if (kEstimate && blockIdx.x == 0 && threadIdx.x == 0) {
    *workspace.tile_counter = 0;
  }
  const PoolSource from = find_source<kMode>(arguments, task, sequence());
  const PoolShape& shape = from.shape;
  if (kRagged && chunk >= shape.chunks) {
    return;
  }
  const int64_t first_block = chunk * shape.chunk;
  const int64_t end_block = min(first_block + shape.chunk, shape.blocks);
  const int lane = threadIdx.x % kRowThreads;
  const int group = threadIdx.x / kRowThreads;
  const int warp = warp_index();
  const int warp_lane = lane_index();
  const int head_dim = kRows == Rows::kWhole ? kWidth : arguments.head_dim;
  const bool has_dims = kRows == Rows::kWhole || lane * kVector < head_dim;
  const Element* source = static_cast<const Element*>(task.x.data) + from.offset +
                          own_head() * task.x.head_stride + lane * kVector;
  EnergySums energies;
  for (int64_t block = first_block; block < end_block; ++block) {
    const int buffer = static_cast<int>(block - first_block) % 2;
    const int64_t first_row = block * task.block_size;
    const int rows = static_cast<int>(min(shape.length - first_row, int64_t{task.block_size}));
    float sum[kVector] = {};
    const auto add_rows = [&](auto load_row) {
      const int end_row = has_dims ? rows : 0;
#pragma unroll kLoads
      for (int row = group; row < end_row; row += kRowGroups) {
        const Pack<Element> pack = load_row(row);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sum[i] += to_float(pack.element[i]);
        }
      }
    };
    if (kRagged && from.paged) {
      const PagedTokens tokens(task.x, arguments.ragged, sequence());
      const int first_key = static_cast<int>(first_row);
      add_rows([&](int row) {
        return load_or_zeros<Element, kRows>(tokens.find(source, first_key + row));
      });
    } else {
      const Element* row_source = source + first_row * task.x.row_stride;
      add_rows([&](int row) { return load<Element, kRows>(row_source + row * task.x.row_stride); });
    }
    partial[buffer][group][lane * 2] = {sum[0], sum[1], sum[2], sum[3]};
    partial[buffer][group][lane * 2 + 1] = {sum[4], sum[5], sum[6], sum[7]};
    __syncthreads();
    // The buffer is filled again two blocks on, behind a barrier that this warp reaches later.
    if (warp == (block - first_block) % kEmitWarps) {
      LaneMean<kWidth> means = {};
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const int dim = first_dim(quad, warp_lane);
        if (dim < kWidth) {
          float4 mean = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int i = 0; i < kRowGroups; ++i) {
            const float4 part = partial[buffer][i][dim / 4];
            mean = {mean.x + part.x, mean.y + part.y, mean.z + part.z, mean.w + part.w};
          }
          const float count = static_cast<float>(rows);
          mean = {mean.x / count, mean.y / count, mean.z / count, mean.w / count};
          if constexpr (std::is_same_v<Element, Fp8Code>) {
            const float scale = mean_scale(task.scale, own_head());
            mean = {mean.x * scale, mean.y * scale, mean.z * scale, mean.w * scale};
          }
          if (task.means != nullptr && dim < head_dim) {
            *reinterpret_cast<float4*>(task.means + (head * task.shape.blocks + block) * head_dim +
                                       dim) = mean;
          }
          means[quad] = mean;
        }
      }
      if constexpr (kEstimate) {
        if (task.is_key) {
          write_key_tile<kWidth>(workspace, head, block, means, warp_lane);
        }
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          const int dim = first_dim(quad, warp_lane);
          if (dim < kWidth) {
            energies.add(means[quad], band_nibble(arguments.high, dim),
                         band_nibble(arguments.low, dim));
          }
        }
      }
    }
  }
  if constexpr (kEstimate) {
    const int64_t all_heads = arguments.q_heads + arguments.kv_heads;
    const int64_t energy_head =
        sequence() * all_heads + own_head() + (task.is_key ? arguments.q_heads : 0);
    energies.store(workspace.head_energies(energy_head), chunk, static_cast<int>(shape.chunks));
    if (task.is_key && chunk + 1 == shape.chunks && warp == 0) {
      pad_key_tiles<kWidth>(workspace, head, shape.blocks, warp_lane);
    }
  }
}

template <typename Element, PoolMode kMode>
cudaError_t launch_pool(const PoolArguments& arguments, cudaStream_t stream) {
  const PoolTask& first = arguments.tasks[0];
  const PoolTask& second = arguments.tasks[1];
  const int64_t first_grid = arguments.batch * first.heads * first.ctas;
  const int64_t grid = first_grid + arguments.batch * second.heads * second.ctas;
  if (grid == 0) {
    return cudaSuccess;
  }
  const bool aligned = is_aligned(first.x) && is_aligned(second.x);
  return RowsOfAnyWidth::launch_first(
      [&](auto rows) { return rows.fits(arguments.head_dim, aligned); },
      [&](auto rows) {
        return launch_kernel(pool_blocks_kernel<Element, decltype(rows), kMode>,
                             {grid, kPoolThreads, 0}, stream, arguments, first_grid);
      });
}

template <typename Element, PoolMode kMode>
void describe_pool(std::vector<KernelInfo>& kernels) {
  const std::string name = kMode == PoolMode::kMeans      ? "block_pool<"
                           : kMode == PoolMode::kEnergies ? "pool_for_bands<"
                                                          : "pool_for_bands_ragged<";
  RowsOfAnyWidth::for_each([&](auto rows) {
    describe_kernel(
        kernels, name + ElementTraits<Element>::kName + ", " + rows.name() + ">",
        kMode == PoolMode::kMeans ? "one block of tokens" : "a chunk of blocks of q or k",
        pool_blocks_kernel<Element, decltype(rows), kMode>, kPoolThreads, 0);
  });
}

}  // namespace prism

// All that a file of instantiations/ holds.
#define PRISM_INSTANTIATE_POOL(...)                                                                \
  template cudaError_t prism::launch_pool<__VA_ARGS__>(const prism::PoolArguments&, cudaStream_t); \
  template void prism::describe_pool<__VA_ARGS__>(std::vector<prism::KernelInfo>&)
