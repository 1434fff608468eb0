// Which attention kernel serves which call, and in what order it computes: pure functions, testable
// without a GPU.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// kSm90: TMA + wgmma, for Hopper. kSm80: cp.async + mma.sync, for every other GPU from Ampere on.
enum class AttentionKernel { kUnsupported, kSm80, kSm90 };

struct AttentionChoice {
  AttentionKernel kernel;
  const char* name;  // "sm80", "sm90" or "unsupported: <reason>"
};

// What the choice depends on. `has_sm90` says that the build contains sm_90a code; `tma` that
// q, k and v can be described to the tensor memory accelerator.
struct AttentionTraits {
  int sm;  // compute capability, 10 * major + minor
  int64_t head_dim;
  int64_t q_block_size;
  int64_t k_block_size;
  bool has_sm90;
  bool tma;
  bool fp8 = false;            // k and v
  bool score_options = false;  // softcap or a window
};

constexpr bool block_sizes_supported(int64_t q_block_size, int64_t k_block_size) {
  return (q_block_size == 128 && (k_block_size == 128 || k_block_size == 64)) ||
         (q_block_size == 64 && k_block_size == 64);
}

// Padded with zeros up to 64, 128 or 256 in shared memory. Rows are moved 16 bytes at a time.
constexpr bool head_dim_supported(int64_t head_dim) {
  return head_dim > 0 && head_dim <= 256 && head_dim % 8 == 0;
}

// Rows that the coordinates of a ragged batch can tell apart (sm90/tensor_map.h).
constexpr int64_t kMaxSliceRows = 0x7fff0000;

// Rows of one sequence of a ragged batch: x coordinates, with room for a tile beyond.
constexpr int64_t kMaxSliceLength = (1 << 30) - 256;

// What TMA asks of every tensor: 16-byte aligned strides and start.
inline bool tma_compatible(const TensorView& x, int element_bytes = 2) {
  const int64_t strides = x.batch_stride | x.head_stride | x.row_stride;
  return strides % (16 / element_bytes) == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.row_stride > 0;
}

constexpr int kv_element_bytes(const SparseAttentionParams& params) {
  return params.kv_is_fp8 ? 1 : 2;
}

// TMA and cp.async read q, k and v under the same conditions.
inline bool moves_16_bytes(const SparseAttentionParams& params) {
  const int kv_bytes = kv_element_bytes(params);
  return tma_compatible(params.q) && tma_compatible(params.k, kv_bytes) &&
         tma_compatible(params.v, kv_bytes);
}

// Rows from one page of a pool to the next.
constexpr int64_t page_rows(const TensorView& x) { return x.batch_stride / x.row_stride; }

// Whether TMA can follow the pages of k and v: a page must lie whole rows after the one before, as
// many in both, and fill the eight rows after which the pattern of shared memory repeats.
constexpr bool tma_pages_compatible(const TensorView& k, const TensorView& v,
                                    const RaggedBatch& ragged) {
  if (k.row_stride <= 0 || v.row_stride <= 0) {
    return false;
  }
  return ragged.page_size() >= 8 && k.batch_stride % k.row_stride == 0 &&
         v.batch_stride % v.row_stride == 0 && page_rows(k) == page_rows(v) &&
         (ragged.pages - 1) * page_rows(k) + ragged.page_size() < kMaxSliceRows;
}

constexpr AttentionChoice choose_attention_kernel(const AttentionTraits& traits) {
  if (traits.sm < 80) {
    return {AttentionKernel::kUnsupported,
            "unsupported: the GPU's compute capability is under 8.0"};
  }
  if (!head_dim_supported(traits.head_dim)) {
    return {AttentionKernel::kUnsupported,
            "unsupported: head_dim must be a multiple of 8 up to 256"};
  }
  if (!block_sizes_supported(traits.q_block_size, traits.k_block_size)) {
    return {AttentionKernel::kUnsupported,
            "unsupported: (q_block_size, k_block_size) must be (128, 128), (128, 64) or (64, 64)"};
  }
  // The Hopper kernel has no shared memory for fp8 keys and values beside their 16-bit copies
  // beyond head_dim 128, and no instantiation of it for fp8 with softcap or windows.
  const bool fits = !traits.fp8 || (traits.head_dim <= 128 && !traits.score_options);
  if (traits.sm == 90 && traits.has_sm90 && traits.tma && fits && traits.q_block_size == 128) {
    return {AttentionKernel::kSm90, "sm90"};
  }
  return {AttentionKernel::kSm80, "sm80"};
}

// Query tiles of all heads. Of a ragged batch, whose lengths the host does not know, the most that
// there can be.
inline int64_t count_tiles(const SparseAttentionParams& params, int tile_m) {
  if (params.ragged.is_ragged()) {
    return params.q_heads * ((params.ragged.total_q + params.batch * (tile_m - 1)) / tile_m);
  }
  return params.batch * params.q_heads * ((int64_t{params.q_len} + tile_m - 1) / tile_m);
}

// KV heads whose tiles are interleaved: as many as share most of the L2 cache, so that all their
// query rows, longest first, run against K and V that stay in it. Evenly shared out, since a small
// last section would end in a few long rows.
inline int kv_section(int64_t k_len, int head_dim, int64_t kv_heads, int64_t l2_bytes,
                      int element_bytes = 2) {
  const int64_t head_bytes = 2 * k_len * head_dim * element_bytes;  // K and V
  const int64_t fitting = head_bytes > 0 ? l2_bytes * 7 / 10 / head_bytes : kv_heads;
  if (fitting < 2) {
    return 1;
  }
  const int64_t sections = (kv_heads + fitting - 1) / fitting;
  return static_cast<int>((kv_heads + sections - 1) / sections);
}

}  // namespace prism
