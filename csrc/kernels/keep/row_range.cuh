// What a query block may see, and what it always keeps.
#pragma once

#include <cstdint>

#include "kernels/common/batch.cuh"

namespace prism {

// Key blocks as ranges: visible [0, visible), sink [0, sink_end), recent [recent_begin,
// recent_end).
struct RowRange {
  int visible;
  int sink_end;
  int recent_begin;
  int recent_end;
};

// Token positions fit 32 bits, whose division is much cheaper.
__device__ inline int block_of(int64_t position, int block_size) {
  return static_cast<int>(static_cast<uint32_t>(position) / static_cast<uint32_t>(block_size));
}

__device__ inline RowRange row_range(const SelectParams& params, const Lengths& lengths,
                                     int q_block) {
  const int64_t offset = int64_t{lengths.k_len} - lengths.q_len;
  const int64_t first = static_cast<int64_t>(q_block) * params.q_block_size + offset;
  const int64_t end_row =
      min((static_cast<int64_t>(q_block) + 1) * params.q_block_size, int64_t{lengths.q_len});
  const int64_t last = end_row - 1 + offset;  // token position of the block's last query
  const int k_blocks = lengths.k_blocks;
  const int own_end = last < 0 ? 0 : min(block_of(last, params.k_block_size) + 1, k_blocks);
  const int visible = params.causal ? own_end : k_blocks;
  const int first_own = first < 0 ? 0 : block_of(first, params.k_block_size);
  const int64_t recent_begin = params.rules.keep_recent == 0
                                   ? int64_t{own_end}
                                   : max(first_own - (params.rules.keep_recent - 1), int64_t{0});
  return {visible, static_cast<int>(min(params.rules.keep_sink, int64_t{visible})),
          static_cast<int>(min(recent_begin, int64_t{visible})), min(own_end, visible)};
}

__device__ inline RowRange row_range(const SelectParams& params, int q_block) {
  return row_range(params, Lengths::longest(params), q_block);
}

// Bits of word `word` that lie in [begin, end).
__device__ inline uint32_t range_bits(int word, int begin, int end) {
  const int low = max(begin - word * 32, 0);
  const int high = min(end - word * 32, 32);
  if (low >= high) {
    return 0;
  }
  return (high == 32 ? 0xffffffffu : (1u << high) - 1u) & ~((1u << low) - 1u);
}

}  // namespace prism
