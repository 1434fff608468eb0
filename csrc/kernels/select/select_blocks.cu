#include <algorithm>
#include <limits>

#include "kernels/describe.h"
#include "kernels/select/band_energy.cuh"
#include "kernels/select/select_blocks.h"
#include "kernels/select/top_p.cuh"

namespace prism {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = kWarps;  // query rows of one CTA: at most one a warp
constexpr int kMaxScores = static_cast<int>(kMaxSelectKeyBlocks);  // floats of one CTA

// One CTA handles `rows` query rows of one head. Their scores of one band at a time stay in
// shared memory; only bits and counts leave it.
struct SelectPlan {
  int rows;    // a power of two
  int stride;  // scores a row, a multiple of 32
  int words;   // mask words a row

  __host__ __device__ explicit SelectPlan(int64_t k_blocks)
      : rows(kMaxRows),
        stride(static_cast<int>((k_blocks + 31) / 32 * 32)),
        words(static_cast<int>((k_blocks + 31) / 32)) {
    while (rows > 1 && rows * stride > kMaxScores) {
      rows /= 2;
    }
  }

  __host__ __device__ int smem_bytes(int head_dim) const {
    return static_cast<int>(sizeof(float)) *
           (rows * stride + rows * words + rows * head_dim + kWarps);
  }
};

// The key blocks one query block may see, and those it always keeps, as ranges [0, end) and
// [begin, end).
struct RowRange {
  int visible;
  int sink_end;
  int recent_begin;
  int recent_end;
};

__device__ RowRange row_range(const SelectBlocksParams& params, int64_t q_block) {
  const int64_t offset = params.k_len - params.q_len;
  const int64_t first = q_block * params.q_block_size + offset;
  const int64_t end_row = min((q_block + 1) * params.q_block_size, params.q_len);
  const int64_t last = end_row - 1 + offset;  // token position of the block's last query
  const int64_t own_end = last < 0 ? 0 : min(last / params.k_block_size + 1, params.k_blocks);
  const int64_t visible = params.causal ? own_end : params.k_blocks;
  const int64_t first_own = first < 0 ? 0 : first / params.k_block_size;
  const int64_t recent_begin =
      params.keep_recent == 0 ? own_end : max(first_own - (params.keep_recent - 1), int64_t{0});
  return {static_cast<int>(visible), static_cast<int>(min(params.keep_sink, visible)),
          static_cast<int>(min(recent_begin, visible)), static_cast<int>(min(own_end, visible))};
}

// Bits of word `word` that lie in [begin, end).
__device__ uint32_t range_bits(int word, int begin, int end) {
  const int low = max(begin - word * 32, 0);
  const int high = min(end - word * 32, 32);
  if (low >= high) {
    return 0;
  }
  return (high == 32 ? 0xffffffffu : (1u << high) - 1u) & ~((1u << low) - 1u);
}

// Dot products of `kRows` query rows with key blocks [0, k_end). A thread owns a key block, so
// every value it loads serves all rows.
template <int kHeadDim, int kRows>
__device__ void score_rows(const float* keys, int64_t key_stride, const float* s_q, int k_end,
                           const Band& band, float* s_scores, int score_stride) {
  const bool aligned = key_stride % 4 == 0 && reinterpret_cast<uintptr_t>(keys) % 16 == 0;
  for (int key = threadIdx.x; key < k_end; key += kThreads) {
    const float* source = keys + key * key_stride;
    float dot[kRows] = {};
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 4) {
      const uint32_t used = static_cast<uint32_t>(band.dims[d / 64] >> (d % 64)) & 15u;
      if (used == 0) {
        continue;
      }
      float4 x;
      if (used == 15u && aligned) {
        x = __ldg(reinterpret_cast<const float4*>(source + d));
      } else {
        x.x = used & 1 ? __ldg(source + d) : 0.f;
        x.y = used & 2 ? __ldg(source + d + 1) : 0.f;
        x.z = used & 4 ? __ldg(source + d + 2) : 0.f;
        x.w = used & 8 ? __ldg(source + d + 3) : 0.f;
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float4 y = *reinterpret_cast<const float4*>(s_q + row * kHeadDim + d);
        dot[row] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      s_scores[row * score_stride + key] = dot[row];
    }
  }
}

template <int kHeadDim, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    select_blocks_kernel(const __grid_constant__ SelectBlocksParams params) {
  extern __shared__ float4 smem[];
  const SelectPlan plan(params.k_blocks);
  float* s_q = reinterpret_cast<float*>(smem);  // [kRows][kHeadDim], scaled
  float* s_scores = s_q + kRows * kHeadDim;     // [kRows][stride]
  uint32_t* s_words = reinterpret_cast<uint32_t*>(s_scores + kRows * plan.stride);
  float* s_scratch = reinterpret_cast<float*>(s_words + kRows * plan.words);

  const int64_t row_groups = (params.q_blocks + kRows - 1) / kRows;
  // The last rows see the most blocks: they go first.
  const int64_t first_row = (row_groups - 1 - blockIdx.x % row_groups) * kRows;
  const int q_head = static_cast<int>(blockIdx.x / row_groups % params.q_heads);
  const int64_t batch = blockIdx.x / row_groups / params.q_heads;
  const int kv_head = q_head / (params.q_heads / params.kv_heads);
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), params.q_blocks - first_row));

  const float* queries = static_cast<const float*>(params.q_means.data) +
                         batch * params.q_means.batch_stride + q_head * params.q_means.head_stride;
  const float* keys = static_cast<const float*>(params.k_means.data) +
                      batch * params.k_means.batch_stride + kv_head * params.k_means.head_stride;
  const int heads = params.q_heads + params.kv_heads;
  const float* q_energy = params.energies + (batch * heads + q_head) * kBandEnergies;
  const float* k_energy =
      params.energies + (batch * heads + params.q_heads + kv_head) * kBandEnergies;

  // Row r belongs to warps [r * warps_per_row, (r + 1) * warps_per_row).
  constexpr int kWarpsPerRow = kWarps / kRows;
  const int row = threadIdx.x / 32 / kWarpsPerRow;
  const RowWarps row_warps{kWarpsPerRow, static_cast<int>(threadIdx.x / 32 % kWarpsPerRow),
                           static_cast<int>(threadIdx.x % 32), s_scratch + row * kWarpsPerRow};
  const RowRange range = row < rows ? row_range(params, first_row + row) : RowRange{0, 0, 0, 0};
  const int k_end = row_range(params, first_row + rows - 1).visible;

  for (int i = threadIdx.x; i < kRows * plan.words; i += kThreads) {
    s_words[i] = 0;
  }
#pragma unroll 1
  for (int b = 0; b < 2; ++b) {
    const Band& band = b == 0 ? params.high : params.low;
    if (band.size == 0) {
      continue;
    }
    const int energy = b == 0 ? kHighEnergy : kLowEnergy;
    const float tau = sqrtf(static_cast<float>(band.size) / kHeadDim) *
                      relative_rms(q_energy[energy], q_energy[kTotalEnergy],
                                   static_cast<float>(params.q_blocks), band.size, kHeadDim) *
                      relative_rms(k_energy[energy], k_energy[kTotalEnergy],
                                   static_cast<float>(params.k_blocks), band.size, kHeadDim);
    const float scale = 1.f / (sqrtf(static_cast<float>(band.size)) * at_least_epsilon(tau));
    __syncthreads();  // the previous band's scores and queries are done with
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += kThreads) {
      const int64_t q_block = min(first_row + i / kHeadDim, params.q_blocks - 1);
      const int dim = i % kHeadDim;
      s_q[i] =
          in_band(band, dim) ? queries[q_block * params.q_means.row_stride + dim] * scale : 0.f;
    }
    __syncthreads();
    score_rows<kHeadDim, kRows>(keys, params.k_means.row_stride, s_q, k_end, band, s_scores,
                                plan.stride);
    __syncthreads();
    float* scores = s_scores + row * plan.stride;
    const bool valid = softmax_to_fixed(scores, range.visible, row_warps);
    TopP kept{0, 0, true};
    const auto* fixed = reinterpret_cast<const uint32_t*>(scores);
    if (params.top_p < 1.0) {
      kept = find_top_p(fixed, range.visible, params.top_p, row_warps);
      kept.keep_all = !valid && params.top_p > 0.0;
    }
    if (row_warps.warp == 0) {
      mark_kept(fixed, range.visible, kept, s_words + row * plan.words, row_warps.lane);
    }
  }
  __syncthreads();

  if (row < rows && row_warps.warp == 0) {
    const int64_t index = (batch * params.q_heads + q_head) * params.q_blocks + first_row + row;
    int count = 0;
    for (int word = row_warps.lane; word < plan.words; word += 32) {
      const uint32_t bits = s_words[row * plan.words + word] | range_bits(word, 0, range.sink_end) |
                            range_bits(word, range.recent_begin, range.recent_end);
      params.bits[index * plan.words + word] = bits;
      count += __popc(bits);
    }
    count = __reduce_add_sync(0xffffffffu, count);
    if (row_warps.lane == 0) {
      params.counts[index] = count;
    }
  }
}

template <int kHeadDim, int kRows>
cudaError_t launch_select(const SelectBlocksParams& params, int smem_bytes, cudaStream_t stream) {
  const int64_t row_groups = (params.q_blocks + kRows - 1) / kRows;
  const int64_t grid = row_groups * params.q_heads * params.batch;
  if (grid > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  const auto kernel = select_blocks_kernel<kHeadDim, kRows>;
  // Set at every launch: the attribute belongs to the device, not to the process.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(grid), kThreads, smem_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t launch_head_dim(const SelectBlocksParams& params, cudaStream_t stream) {
  const unsigned energy_grid =
      static_cast<unsigned>(params.batch * (params.q_heads + params.kv_heads));
  band_energy_kernel<kHeadDim, kThreads><<<energy_grid, kThreads, 0, stream>>>(params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return error;
  }
  const SelectPlan plan(params.k_blocks);
  const int smem_bytes = plan.smem_bytes(kHeadDim);
  switch (plan.rows) {
    case 8:
      return launch_select<kHeadDim, 8>(params, smem_bytes, stream);
    case 4:
      return launch_select<kHeadDim, 4>(params, smem_bytes, stream);
    case 2:
      return launch_select<kHeadDim, 2>(params, smem_bytes, stream);
    default:
      return launch_select<kHeadDim, 1>(params, smem_bytes, stream);
  }
}

template <int kHeadDim>
void describe(std::vector<KernelInfo>& kernels) {
  const std::string dim = ", d" + std::to_string(kHeadDim) + ">";
  describe_kernel(kernels, "band_energy<d" + std::to_string(kHeadDim) + ">", "one head",
                  band_energy_kernel<kHeadDim, kThreads>, kThreads, 0);
  describe_kernel(kernels, "select_blocks<rows 8" + dim, "8 query rows, 2048 key blocks",
                  select_blocks_kernel<kHeadDim, 8>, kThreads,
                  SelectPlan(2048).smem_bytes(kHeadDim));
  describe_kernel(kernels, "select_blocks<rows 1" + dim, "1 query row, 16384 key blocks",
                  select_blocks_kernel<kHeadDim, 1>, kThreads,
                  SelectPlan(16384).smem_bytes(kHeadDim));
}

}  // namespace

cudaError_t launch_select_blocks(const SelectBlocksParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.q_heads == 0 || params.q_blocks == 0) {
    return cudaSuccess;
  }
  if (params.k_blocks > kMaxSelectKeyBlocks) {
    return cudaErrorInvalidValue;
  }
  switch (params.head_dim) {
    case 64:
      return launch_head_dim<64>(params, stream);
    case 128:
      return launch_head_dim<128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

void describe_select_blocks(std::vector<KernelInfo>& kernels) {
  describe<64>(kernels);
  describe<128>(kernels);
}

}  // namespace prism
