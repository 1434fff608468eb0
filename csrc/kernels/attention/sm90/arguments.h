// What the host passes to the Hopper kernel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/params.h"

namespace prism::sm90 {

// A row of q, k, v or out has the coordinates (x, y), and z is the same for all (tensor_map.h).
// This is the offset, in elements, of a row of a plain array with the same coordinates.
struct RowOffsets {
  int64_t x_stride;
  int64_t y_stride;
  int64_t head_stride;
  int64_t base;

  __device__ int64_t at(int x, int y, int head) const {
    return base + x * x_stride + y * y_stride + head * head_stride;
  }
};

struct KernelArguments {
  SparseAttentionParams params;
  CUtensorMap tma_q;  // 64-byte aligned
  CUtensorMap tma_k;
  CUtensorMap tma_v;
  CUtensorMap tma_o;
  RowOffsets out;
  RowOffsets lse;
  int z;
  int q_end;         // x of a sequence's rows of q ends here
  int copy_rows;     // rows of k and v that one copy moves, at most a box
  int page_stride;   // of a page, in y
  int q_blocks;      // of the mask
  int k_blocks;      // of the mask
  int tiles;         // query tiles of all heads and batch elements; if ragged, an upper bound
  int kv_section;    // KV heads whose tiles are interleaved
  float cap_factor;  // of cap_scores; 0: scores have no cap
};

// Position in a ring of stages whose barriers flip phase once a round: one counter, because
// registers are scarce.
template <int kStages>
struct Ring {
  uint32_t count = 0;

  __device__ uint32_t stage() const { return count % kStages; }
  __device__ uint32_t phase() const { return count / kStages % 2; }
  __device__ void advance() { ++count; }
};

}  // namespace prism::sm90
