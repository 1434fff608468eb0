#include "kernels/bands/prepare_keys.h"

#include <cstdint>
#include <string>

#include "kernels/bands/emit_means.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/describe.h"

namespace prism {

namespace {

constexpr int kThreads = 32 * kEmitWarps;

struct KeyArguments {
  TensorView means;  // (batch, kv_heads, blocks, head_dim)
  int64_t blocks;
  int q_heads;
  int kv_heads;
  int head_dim;
  Band high;
  Band low;
  BandsWorkspace workspace;
};

__device__ float4 load_mean(const float* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 == 0) {
    return __ldg(reinterpret_cast<const float4*>(source));
  }
  return {source[0], source[1], source[2], source[3]};
}

// A CTA takes one energy chunk of one head, its warps the blocks in turn.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    prepare_keys_kernel(const __grid_constant__ KeyArguments arguments) {
  wait_for_producer();
  let_consumer_start();
  const EnergyChunks chunks(arguments.blocks);
  const TensorView& means = arguments.means;
  const int chunk = static_cast<int>(blockIdx.x) % chunks.count;
  const int64_t head = static_cast<int>(blockIdx.x) / chunks.count;  // over the batch
  const int64_t batch = head / arguments.kv_heads;
  const int64_t own_head = head % arguments.kv_heads;
  const int64_t first_block = chunk * chunks.size;
  const int64_t end_block = min(first_block + chunks.size, arguments.blocks);
  const float* source = static_cast<const float*>(means.data) + batch * means.batch_stride +
                        own_head * means.head_stride;
  const BandsWorkspace& workspace = arguments.workspace;
  EnergySums energies;
  for (int64_t block = first_block + warp_index(); block < end_block; block += kEmitWarps) {
    LaneMean<kWidth> mean = {};
#pragma unroll
    for (int quad = 0; quad < static_cast<int>(sizeof(mean) / sizeof(float4)); ++quad) {
      const int dim = first_dim(quad, lane_index());
      if (dim < arguments.head_dim) {
        mean[quad] = load_mean(source + block * means.row_stride + dim);
        energies.add(mean[quad], band_nibble(arguments.high, dim), band_nibble(arguments.low, dim));
      }
    }
    write_key_tile<kWidth>(workspace, head, block, mean, lane_index());
  }
  const int64_t energy_head =
      batch * (arguments.q_heads + arguments.kv_heads) + arguments.q_heads + own_head;
  energies.store(workspace.head_energies(energy_head), chunk, chunks.count);
  if (chunk + 1 == chunks.count && warp_index() == 0) {
    pad_key_tiles<kWidth>(workspace, head, arguments.blocks, lane_index());
  }
}

}  // namespace

cudaError_t launch_prepare_keys(const BandsParams& params, const BandsWorkspace& workspace,
                                cudaStream_t stream) {
  const SelectParams& select = params.select;
  const int64_t grid =
      select.batch * select.kv_heads * int64_t{EnergyChunks(select.k_blocks).count};
  if (grid == 0) {
    return cudaSuccess;
  }
  const KeyArguments arguments{params.k_means,  select.k_blocks, select.q_heads, select.kv_heads,
                               select.head_dim, params.high,     params.low,     workspace};
  return launch_width(select.head_dim, [&](auto width) {
    return launch_kernel(prepare_keys_kernel<width>, {grid, kThreads, 0}, stream, arguments);
  });
}

void describe_prepare_keys(std::vector<KernelInfo>& kernels) {
  Widths::for_each([&](auto width) {
    describe_kernel(kernels, "prepare_keys<d up to " + std::to_string(width) + ">",
                    "a chunk of means", prepare_keys_kernel<width>, kThreads, 0);
  });
}

}  // namespace prism
