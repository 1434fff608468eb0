#include <algorithm>
#include <cstdint>

#include "kernels/describe.h"
#include "kernels/launch.h"
#include "kernels/pool/block_pool.h"
#include "kernels/pool/emit_means.cuh"
#include "kernels/pool/load_rows.cuh"
#include "kernels/select/lengths.cuh"

namespace prism {

namespace {

constexpr int kThreads = 32 * kEmitWarps;

// CTAs of a multiprocessor. With eight loads a thread in flight, 6 cover its bandwidth.
constexpr int min_ctas(Rows rows, bool estimate, bool ragged) {
  return ragged ? (rows == Rows::kUnaligned ? 4 : 5) : estimate ? 6 : 8;
}

// The tokens of a head; a CTA takes `chunk` consecutive blocks of them.
struct PoolShape {
  int64_t length;
  int64_t blocks;
  int64_t chunk;
  int64_t chunks;  // of one head
};

__host__ __device__ inline PoolShape energy_shape(int64_t length, int block_size) {
  const int64_t blocks = (length + block_size - 1) / block_size;
  const EnergyChunks chunks(blocks);
  return {length, blocks, chunks.size, chunks.count};
}

// One tensor to pool.
struct PoolTask {
  TensorView x;
  float* means;  // (batch, heads, blocks, head_dim), contiguous; nullptr: not wanted
  int64_t heads;
  int64_t ctas;     // of one head
  PoolShape shape;  // of a ragged batch that of the longest sequence
  int block_size;
  bool is_key;
  const float* scale;  // of fp8 heads
};

struct PoolArguments {
  PoolTask tasks[2];
  int head_dim;
  int64_t first_grid;         // CTAs of tasks[0]; the rest belong to tasks[1]
  SelectBlocksParams select;  // what kEstimate fills the workspace of
};

// What a CTA reads of a sequence: shape, and where its rows lie.
struct PoolSource {
  PoolShape shape;
  int64_t offset;  // of the first row, in elements; of pages 0
  bool paged;
};

template <bool kRagged>
__device__ PoolSource find_source(const PoolArguments& arguments, const PoolTask& task,
                                  int64_t batch) {
  if constexpr (kRagged) {
    const RaggedBatch& ragged = arguments.select.ragged;
    const int longest = static_cast<int>(task.shape.length);
    const int sequence = static_cast<int>(batch);
    const Span span =
        task.is_key ? k_span(ragged, sequence, longest) : q_span(ragged, sequence, longest);
    return {energy_shape(span.length, task.block_size), span.start * task.x.row_stride,
            task.is_key && ragged.is_paged()};
  } else {
    return {task.shape, batch * task.x.batch_stride, false};
  }
}

// kWidth / 8 threads span a row, the others take rows in parallel. Their partial sums meet in
// shared memory, where the warps finish blocks in turn while the others load the next block.
template <typename Element, int kWidth, Rows kRows, bool kEstimate, bool kRagged>
__global__ void __launch_bounds__(kThreads, min_ctas(kRows, kEstimate, kRagged))
    block_pool_kernel(const __grid_constant__ PoolArguments arguments) {
  constexpr int kRowThreads = kWidth / kVector;
  constexpr int kRowGroups = kThreads / kRowThreads;
  // As many loads in flight as a thread has rows in the smallest block, up to eight.
  constexpr int kLoads = kWidth < 128 ? kWidth / 16 : 8;
  constexpr int kQuads = sizeof(LaneMean<kWidth>) / sizeof(float4);
  __shared__ float4 partial[2][kRowGroups][kWidth / 4];

  let_consumer_start();
  const bool second = blockIdx.x >= arguments.first_grid;
  const PoolTask& task = arguments.tasks[second];
  const int64_t index = blockIdx.x - (second ? arguments.first_grid : 0);
  const int64_t chunk = index % task.ctas;
  const int64_t head = index / task.ctas;  // over the batch
  if (kEstimate && blockIdx.x == 0 && threadIdx.x == 0) {
    *SelectWorkspace(arguments.select).tile_counter = 0;
  }
  const PoolSource from = find_source<kRagged>(arguments, task, head / task.heads);
  const PoolShape& shape = from.shape;
  if (kRagged && chunk >= shape.chunks) {
    return;
  }
  const int64_t first_block = chunk * shape.chunk;
  const int64_t end_block = min(first_block + shape.chunk, shape.blocks);
  const int lane = threadIdx.x % kRowThreads;
  const int group = threadIdx.x / kRowThreads;
  const int warp = threadIdx.x / 32;
  const int warp_lane = threadIdx.x % 32;
  const int head_dim = kRows == Rows::kWhole ? kWidth : arguments.head_dim;
  const bool has_dims = kRows == Rows::kWhole || lane * kVector < head_dim;
  const Element* source = static_cast<const Element*>(task.x.data) + from.offset +
                          head % task.heads * task.x.head_stride + lane * kVector;
  EnergySums energies;
  for (int64_t block = first_block; block < end_block; ++block) {
    const int buffer = static_cast<int>(block - first_block) % 2;
    const int64_t first_row = block * task.block_size;
    const int rows = static_cast<int>(min(shape.length - first_row, int64_t{task.block_size}));
    float sum[kVector] = {};
    const auto add_rows = [&](auto address_of) {
      const int end_row = has_dims ? rows : 0;
#pragma unroll kLoads
      for (int row = group; row < end_row; row += kRowGroups) {
        const Pack<Element> pack = load<Element, kRows>(address_of(row));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sum[i] += to_float(pack.element[i]);
        }
      }
    };
    if (kRagged && from.paged) {
      const RaggedBatch& ragged = arguments.select.ragged;
      const int sequence = static_cast<int>(head / task.heads);
      const int first_key = static_cast<int>(first_row);
      add_rows([&](int row) {
        const int key = first_key + row;
        return source + page_of(ragged, sequence, key) * task.x.batch_stride +
               (key & (ragged.page_size() - 1)) * task.x.row_stride;
      });
    } else {
      const Element* row_source = source + first_row * task.x.row_stride;
      add_rows([&](int row) { return row_source + row * task.x.row_stride; });
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
            const float scale = mean_scale(task.scale, head % task.heads);
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
          write_key_tile<kWidth>(SelectWorkspace(arguments.select), head, block, means, warp_lane);
        }
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          const int dim = first_dim(quad, warp_lane);
          if (dim < kWidth) {
            energies.add(means[quad], band_nibble(arguments.select.high, dim),
                         band_nibble(arguments.select.low, dim));
          }
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
                   static_cast<int>(shape.chunks));
    if (task.is_key && chunk + 1 == shape.chunks && warp == 0) {
      pad_key_tiles<kWidth>(workspace, head, shape.blocks, warp_lane);
    }
  }
}

template <bool kEstimate, bool kRagged>
cudaError_t launch(PoolArguments arguments, int64_t batch, int head_dim, DType dtype,
                   cudaStream_t stream) {
  arguments.head_dim = head_dim;
  const PoolTask& first = arguments.tasks[0];
  const PoolTask& second = arguments.tasks[1];
  arguments.first_grid = batch * first.heads * first.ctas;
  const int64_t grid = arguments.first_grid + batch * second.heads * second.ctas;
  if (grid == 0) {
    return cudaSuccess;
  }
  const bool aligned = is_aligned(first.x) && is_aligned(second.x);
  const LaunchShape shape{grid, kThreads, 0};
  const auto launch_as = [&](auto element) {
    return launch_rows(head_dim, aligned, [&](auto width, auto rows) {
      const auto kernel = block_pool_kernel<decltype(element), decltype(width)::value,
                                            decltype(rows)::value, kEstimate, kRagged>;
      return launch_kernel(kernel, shape, stream, arguments);
    });
  };
  switch (dtype) {
    case DType::kFloat16:
      return launch_as(__half());
    case DType::kBFloat16:
      return launch_as(__nv_bfloat16());
    default:
      return launch_as(Fp8Code());
  }
}

template <typename Element, int kWidth, Rows kRows>
void describe(std::vector<KernelInfo>& kernels, const std::string& element) {
  const std::string suffix = element + ", " + rows_name(kWidth, kRows) + ">";
  describe_kernel(kernels, "block_pool<" + suffix, "one block of tokens",
                  block_pool_kernel<Element, kWidth, kRows, false, false>, kThreads, 0);
  describe_kernel(kernels, "estimate_pool<" + suffix, "a chunk of blocks of q or k",
                  block_pool_kernel<Element, kWidth, kRows, true, false>, kThreads, 0);
  describe_kernel(kernels, "estimate_pool_ragged<" + suffix, "a chunk of blocks of q or k",
                  block_pool_kernel<Element, kWidth, kRows, true, true>, kThreads, 0);
}

template <typename Element>
void describe_widths(std::vector<KernelInfo>& kernels, const std::string& element) {
  describe<Element, 64, Rows::kWhole>(kernels, element);
  describe<Element, 64, Rows::kShort>(kernels, element);
  describe<Element, 128, Rows::kWhole>(kernels, element);
  describe<Element, 128, Rows::kShort>(kernels, element);
  describe<Element, 256, Rows::kShort>(kernels, element);
}

}  // namespace

cudaError_t launch_block_pool(const BlockPoolParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.length + params.block_size - 1) / params.block_size;
  PoolArguments arguments = {};
  arguments.tasks[0] = {params.x,          params.means,
                        params.heads,
                        /*ctas=*/blocks,   {params.length, blocks, /*chunk=*/1, /*chunks=*/blocks},
                        params.block_size,
                        /*is_key=*/false,  params.scale};
  return launch<false, false>(arguments, params.batch, params.head_dim, params.dtype, stream);
}

cudaError_t launch_estimate_pool(const EstimatePoolParams& params, cudaStream_t stream) {
  const SelectBlocksParams& select = params.select;
  const bool ragged = select.ragged.is_ragged();
  const auto make_task = [&](const TensorView& x, float* means, int64_t heads, int64_t length,
                             int block_size, bool is_key) {
    const PoolShape shape = energy_shape(length, block_size);
    // A shorter sequence may have more chunks.
    const int64_t ctas = ragged ? std::min<int64_t>(shape.blocks, kMaxEnergyChunks) : shape.chunks;
    return PoolTask{x, means, heads, ctas, shape, block_size, is_key, params.k_scale};
  };
  PoolArguments arguments = {};
  arguments.select = select;
  arguments.tasks[0] = make_task(params.q, static_cast<float*>(select.q_means.data), select.q_heads,
                                 select.q_len, select.q_block_size, false);
  arguments.tasks[1] =
      make_task(params.k, nullptr, select.kv_heads, select.k_len, select.k_block_size, true);
  const auto launch_tasks = [&](const PoolArguments& arguments, DType dtype) {
    return ragged ? launch<true, true>(arguments, select.batch, select.head_dim, dtype, stream)
                  : launch<true, false>(arguments, select.batch, select.head_dim, dtype, stream);
  };
  if (!params.k_is_fp8) {
    return launch_tasks(arguments, params.dtype);
  }
  // Of two dtypes, each in a launch of its own.
  const PoolTask keys = arguments.tasks[1];
  arguments.tasks[1] = {};
  const cudaError_t error = launch_tasks(arguments, params.dtype);
  if (error != cudaSuccess) {
    return error;
  }
  arguments.tasks[0] = {};
  arguments.tasks[1] = keys;
  return launch_tasks(arguments, DType::kFloat8E4M3);
}

void describe_block_pool(std::vector<KernelInfo>& kernels) {
  describe_widths<__nv_bfloat16>(kernels, "bf16");
  describe_widths<__half>(kernels, "fp16");
  describe_widths<Fp8Code>(kernels, "fp8");
}

}  // namespace prism
