#include "kernels/keep/keep_blocks.h"

#include <algorithm>
#include <cstdint>

#include "kernels/common/batch.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/warp.cuh"
#include "kernels/describe.h"
#include "kernels/keep/row_range.cuh"

namespace prism {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int64_t kMaxGrid = 1 << 20;  // of CTAs; warps take further rows in turn

// Key blocks [first, end) that some row of query block `q_block` sees.
struct SeenBlocks {
  int first = 0;
  int end = 0;

  __device__ SeenBlocks(const KeepBlocksParams& params, const Lengths& lengths, int q_block) {
    const SelectParams& select = params.select;
    const int64_t first_row = static_cast<int64_t>(q_block) * select.q_block_size;
    if (first_row >= lengths.q_len) {
      return;
    }
    const int64_t end_row = min(first_row + select.q_block_size, int64_t{lengths.q_len});
    const int64_t offset = int64_t{lengths.k_len} - lengths.q_len;  // of positions
    const int64_t end_key = select.causal ? end_row + offset : lengths.k_len;
    end = end_key <= 0 ? 0 : block_of(end_key - 1, select.k_block_size) + 1;
    const int64_t first_key = params.window_left < 0 ? 0 : first_row + offset - params.window_left;
    first = min(first_key <= 0 ? 0 : block_of(first_key, select.k_block_size), end);
  }
};

// A warp a row, a lane a word.
__global__ void __launch_bounds__(kThreads)
    keep_blocks_kernel(const __grid_constant__ KeepBlocksParams params) {
  const SelectParams& select = params.select;
  const int64_t words = (select.k_blocks + 31) / 32;
  const int64_t rows = select.batch * select.q_heads * select.q_blocks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
#pragma unroll 1
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(); row < rows;
       row += step) {
    const int64_t head = row / select.q_blocks;  // over the batch
    const Lengths lengths = Lengths::of(select, static_cast<int>(head / select.q_heads));
    const bool is_short = lengths.q_len < select.q_block_size || lengths.k_len < params.dense_below;
    if (!params.all && !is_short) {
      continue;
    }
    const SeenBlocks seen(params, lengths, static_cast<int>(row % select.q_blocks));
    for (int64_t word = lane_index(); word < words; word += 32) {
      select.bits[row * words + word] = range_bits(static_cast<int>(word), seen.first, seen.end);
    }
    if (lane_index() == 0) {
      select.counts[row] = seen.end - seen.first;
    }
  }
}

}  // namespace

cudaError_t launch_keep_blocks(const KeepBlocksParams& params, cudaStream_t stream) {
  const SelectParams& select = params.select;
  const int64_t rows = select.batch * select.q_heads * select.q_blocks;
  if (rows == 0) {
    return cudaSuccess;
  }
  const int64_t grid = std::min((rows + kWarps - 1) / kWarps, kMaxGrid);
  return launch_kernel(keep_blocks_kernel, {grid, kThreads, 0}, stream, params);
}

void describe_keep_blocks(std::vector<KernelInfo>& kernels) {
  describe_kernel(kernels, "keep_blocks", std::to_string(kWarps) + " query rows",
                  keep_blocks_kernel, kThreads, 0);
}

}  // namespace prism
