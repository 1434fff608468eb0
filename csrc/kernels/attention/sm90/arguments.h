// What the host passes to the Hopper kernel.
#pragma once

#include "kernels/params.h"

namespace prism::sm90 {

template <typename Config>
struct KernelArguments {
  SparseAttentionParams params;
  typename Config::TmaQ tma_q;
  typename Config::TmaKV tma_k;
  typename Config::TmaKV tma_v;
  typename Config::TmaO tma_o;
  int q_blocks;
  int k_blocks;    // key blocks of the mask
  int tiles;       // query tiles of all heads and batch elements
  int kv_section;  // KV heads whose tiles are interleaved
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
