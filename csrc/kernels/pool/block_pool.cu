#include "kernels/describe.h"
#include "kernels/launch.h"
#include "kernels/pool/block_pool.h"
#include "kernels/pool/emit_means.cuh"
#include "kernels/pool/load_rows.cuh"

namespace prism {

namespace {

constexpr int kThreads = 32 * kEmitWarps;

// CTAs of a multiprocessor. With eight loads a thread in flight, 6 cover its bandwidth.
constexpr int min_ctas(bool estimate) { return estimate ? 6 : 8; }

// One tensor to pool; a CTA takes `chunk` consecutive blocks of one head.
struct PoolTask {
  TensorView x;
  float* means;  // (batch, heads, blocks, head_dim), contiguous; nullptr: not wanted
  int64_t heads;
  int64_t length;
  int64_t blocks;
  int64_t chunk;
  int64_t chunks;  // of one head
  int block_size;
  bool is_key;
};

struct PoolArguments {
  PoolTask tasks[2];
  int64_t first_grid;         // CTAs of tasks[0]; the rest belong to tasks[1]
  SelectBlocksParams select;  // what kEstimate fills the workspace of
};

PoolTask make_task(const TensorView& x, float* means, int64_t heads, int64_t length,
                   int block_size) {
  const int64_t blocks = (length + block_size - 1) / block_size;
  return {x, means, heads, length, blocks, /*chunk=*/1, /*chunks=*/blocks, block_size, false};
}

void use_energy_chunks(PoolTask& task) {
  const EnergyChunks chunks(task.blocks);
  task.chunk = chunks.size;
  task.chunks = chunks.count;
}

// kHeadDim / 8 threads span a row, the others take rows in parallel. Their partial sums meet in
// shared memory, where the warps finish blocks in turn while the others load the next block.
template <typename Element, int kHeadDim, bool kAligned, bool kEstimate>
__global__ void __launch_bounds__(kThreads, min_ctas(kEstimate))
    block_pool_kernel(const __grid_constant__ PoolArguments arguments) {
  constexpr int kRowThreads = kHeadDim / kVector;
  constexpr int kRowGroups = kThreads / kRowThreads;
  __shared__ float4 partial[2][kRowGroups][kHeadDim / 4];

  let_consumer_start();
  const bool second = blockIdx.x >= arguments.first_grid;
  const PoolTask& task = arguments.tasks[second];
  const int64_t index = blockIdx.x - (second ? arguments.first_grid : 0);
  const int64_t chunk = index % task.chunks;
  const int64_t head = index / task.chunks;  // over the batch
  const int64_t first_block = chunk * task.chunk;
  const int64_t end_block = min(first_block + task.chunk, task.blocks);
  const int lane = threadIdx.x % kRowThreads;
  const int group = threadIdx.x / kRowThreads;
  const int warp = threadIdx.x / 32;
  const int dim = static_cast<int>(threadIdx.x % 32) * 4;  // of the mean that this lane finishes
  const Element* source = static_cast<const Element*>(task.x.data) +
                          head / task.heads * task.x.batch_stride +
                          head % task.heads * task.x.head_stride + lane * kVector;
  EnergySums energies;
  if (kEstimate && blockIdx.x == 0 && threadIdx.x == 0) {
    *SelectWorkspace(arguments.select).tile_counter = 0;
  }
  for (int64_t block = first_block; block < end_block; ++block) {
    const int buffer = static_cast<int>(block - first_block) % 2;
    const int64_t first_row = block * task.block_size;
    const int rows = static_cast<int>(min(task.length - first_row, int64_t{task.block_size}));
    const Element* row_source = source + first_row * task.x.row_stride;
    float sum[kVector] = {};
    // As many loads in flight as a thread has rows in the smallest block.
#pragma unroll kHeadDim / 16
    for (int row = group; row < rows; row += kRowGroups) {
      const Pack<Element> pack = load<Element, kAligned>(row_source + row * task.x.row_stride);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] += to_float(pack.element[i]);
      }
    }
    partial[buffer][group][lane * 2] = {sum[0], sum[1], sum[2], sum[3]};
    partial[buffer][group][lane * 2 + 1] = {sum[4], sum[5], sum[6], sum[7]};
    __syncthreads();
    // The buffer is filled again two blocks on, behind a barrier that this warp reaches later.
    if (warp == (block - first_block) % kEmitWarps) {
      float4 mean = {0.f, 0.f, 0.f, 0.f};
      if (dim < kHeadDim) {
#pragma unroll
        for (int i = 0; i < kRowGroups; ++i) {
          const float4 part = partial[buffer][i][dim / 4];
          mean = {mean.x + part.x, mean.y + part.y, mean.z + part.z, mean.w + part.w};
        }
        const float count = static_cast<float>(rows);
        mean = {mean.x / count, mean.y / count, mean.z / count, mean.w / count};
        if (task.means != nullptr) {
          *reinterpret_cast<float4*>(task.means + (head * task.blocks + block) * kHeadDim + dim) =
              mean;
        }
      }
      if constexpr (kEstimate) {
        if (task.is_key) {
          write_key_tile<kHeadDim>(SelectWorkspace(arguments.select), head, block, mean, dim / 4);
        }
        if (dim < kHeadDim) {
          energies.add(mean, band_nibble(arguments.select.high, dim),
                       band_nibble(arguments.select.low, dim));
        }
      }
    }
  }
  if constexpr (kEstimate) {
    const SelectWorkspace workspace(arguments.select);
    const int64_t all_heads = arguments.select.q_heads + arguments.select.kv_heads;
    const int64_t energy_head = head / task.heads * all_heads + head % task.heads +
                                (task.is_key ? arguments.select.q_heads : 0);
    energies.store(workspace.head_energies(energy_head), static_cast<int>(chunk),
                   static_cast<int>(task.chunks));
    if (task.is_key && chunk + 1 == task.chunks && warp == 0) {
      pad_key_tiles<kHeadDim>(workspace, head, task.blocks, dim / 4);
    }
  }
}

template <bool kEstimate>
cudaError_t launch(PoolArguments arguments, int64_t batch, int head_dim, DType dtype,
                   cudaStream_t stream) {
  const PoolTask& first = arguments.tasks[0];
  const PoolTask& second = arguments.tasks[1];
  arguments.first_grid = batch * first.heads * first.chunks;
  const int64_t grid = arguments.first_grid + batch * second.heads * second.chunks;
  if (grid == 0) {
    return cudaSuccess;
  }
  const bool aligned = is_aligned(first.x) && is_aligned(second.x);
  const LaunchShape shape{grid, kThreads, 0};
  const auto launch_as = [&](auto element, auto dim) {
    using Element = decltype(element);
    constexpr int kHeadDim = decltype(dim)::value;
    const auto kernel = aligned ? block_pool_kernel<Element, kHeadDim, true, kEstimate>
                                : block_pool_kernel<Element, kHeadDim, false, kEstimate>;
    return launch_kernel(kernel, shape, stream, arguments);
  };
  const auto launch_head_dim = [&](auto element) {
    switch (head_dim) {
      case 64:
        return launch_as(element, std::integral_constant<int, 64>());
      case 128:
        return launch_as(element, std::integral_constant<int, 128>());
      default:
        return cudaErrorInvalidValue;
    }
  };
  return dtype == DType::kFloat16 ? launch_head_dim(__half()) : launch_head_dim(__nv_bfloat16());
}

template <typename Element, int kHeadDim>
void describe(std::vector<KernelInfo>& kernels, const std::string& element) {
  const std::string suffix = element + ", d" + std::to_string(kHeadDim) + ">";
  describe_kernel(kernels, "block_pool<" + suffix, "one block of tokens",
                  block_pool_kernel<Element, kHeadDim, true, false>, kThreads, 0);
  describe_kernel(kernels, "estimate_pool<" + suffix, "a chunk of blocks of q or k",
                  block_pool_kernel<Element, kHeadDim, true, true>, kThreads, 0);
}

}  // namespace

cudaError_t launch_block_pool(const BlockPoolParams& params, cudaStream_t stream) {
  PoolArguments arguments = {};
  arguments.tasks[0] =
      make_task(params.x, params.means, params.heads, params.length, params.block_size);
  return launch<false>(arguments, params.batch, params.head_dim, params.dtype, stream);
}

cudaError_t launch_estimate_pool(const EstimatePoolParams& params, cudaStream_t stream) {
  const SelectBlocksParams& select = params.select;
  PoolArguments arguments = {};
  arguments.select = select;
  arguments.tasks[0] = make_task(params.q, static_cast<float*>(select.q_means.data), select.q_heads,
                                 select.q_len, select.q_block_size);
  arguments.tasks[1] =
      make_task(params.k, nullptr, select.kv_heads, select.k_len, select.k_block_size);
  arguments.tasks[1].is_key = true;
  use_energy_chunks(arguments.tasks[0]);
  use_energy_chunks(arguments.tasks[1]);
  return launch<true>(arguments, select.batch, select.head_dim, params.dtype, stream);
}

void describe_block_pool(std::vector<KernelInfo>& kernels) {
  describe<__nv_bfloat16, 64>(kernels, "bf16");
  describe<__nv_bfloat16, 128>(kernels, "bf16");
  describe<__half, 64>(kernels, "fp16");
  describe<__half, 128>(kernels, "fp16");
}

}  // namespace prism
