#include <cstdint>

#include "kernels/describe.h"
#include "kernels/launch.h"
#include "kernels/pool/emit_means.cuh"
#include "kernels/select/select_blocks.h"

namespace prism {

namespace {

constexpr int kThreads = 32 * kEmitWarps;

__device__ float4 load_mean(const float* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 == 0) {
    return __ldg(reinterpret_cast<const float4*>(source));
  }
  return {source[0], source[1], source[2], source[3]};
}

// A CTA takes one energy chunk of one head, its warps the blocks in turn.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    prepare_means_kernel(const __grid_constant__ SelectBlocksParams params) {
  const EnergyChunks q_chunks(params.q_blocks);
  const EnergyChunks k_chunks(params.k_blocks);
  const int64_t q_grid = params.batch * params.q_heads * q_chunks.count;
  let_consumer_start();

  const bool is_key = blockIdx.x >= q_grid;
  const EnergyChunks chunks = is_key ? k_chunks : q_chunks;
  const TensorView& means = is_key ? params.k_means : params.q_means;
  const int heads = is_key ? params.kv_heads : params.q_heads;
  const int64_t blocks = is_key ? params.k_blocks : params.q_blocks;
  const int64_t index = blockIdx.x - (is_key ? q_grid : 0);
  const int chunk = static_cast<int>(index % chunks.count);
  const int64_t head = index / chunks.count;  // over the batch
  const int64_t first_block = chunk * chunks.size;
  const int64_t end_block = min(first_block + chunks.size, blocks);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const float* source = static_cast<const float*>(means.data) + head / heads * means.batch_stride +
                        head % heads * means.head_stride;
  const SelectWorkspace workspace(params);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *workspace.tile_counter = 0;
  }
  EnergySums energies;
  for (int64_t block = first_block + warp; block < end_block; block += kEmitWarps) {
    LaneMean<kWidth> mean = {};
#pragma unroll
    for (int quad = 0; quad < static_cast<int>(sizeof(mean) / sizeof(float4)); ++quad) {
      const int dim = first_dim(quad, lane);
      if (dim < params.head_dim) {
        mean[quad] = load_mean(source + block * means.row_stride + dim);
        energies.add(mean[quad], band_nibble(params.high, dim), band_nibble(params.low, dim));
      }
    }
    if (is_key) {
      write_key_tile<kWidth>(workspace, head, block, mean, lane);
    }
  }
  const int64_t energy_head = head / heads * (params.q_heads + params.kv_heads) + head % heads +
                              (is_key ? params.q_heads : 0);
  energies.store(workspace.head_energies(energy_head), chunk, chunks.count);
  if (is_key && chunk + 1 == chunks.count && warp == 0) {
    pad_key_tiles<kWidth>(workspace, head, blocks, lane);
  }
}

}  // namespace

cudaError_t launch_prepare_means(const SelectBlocksParams& params, cudaStream_t stream) {
  const int64_t grid =
      params.batch * (params.q_heads * int64_t{EnergyChunks(params.q_blocks).count} +
                      params.kv_heads * int64_t{EnergyChunks(params.k_blocks).count});
  if (grid == 0) {
    return cudaSuccess;
  }
  const LaunchShape shape{grid, kThreads, 0};
  switch (estimation_width(params.head_dim)) {
    case 64:
      return launch_kernel(prepare_means_kernel<64>, shape, stream, params);
    case 128:
      return launch_kernel(prepare_means_kernel<128>, shape, stream, params);
    default:
      return launch_kernel(prepare_means_kernel<256>, shape, stream, params);
  }
}

void describe_prepare_means(std::vector<KernelInfo>& kernels) {
  const auto describe = [&](const char* name, auto kernel) {
    describe_kernel(kernels, name, "a chunk of means", kernel, kThreads, 0);
  };
  describe("prepare_means<d up to 64>", prepare_means_kernel<64>);
  describe("prepare_means<d up to 128>", prepare_means_kernel<128>);
  describe("prepare_means<d up to 256>", prepare_means_kernel<256>);
}

}  // namespace prism
