// Which attention kernel serves which call, and in what order it computes: pure functions, testable
// without a GPU.
#pragma once

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
};

constexpr bool block_sizes_supported(int64_t q_block_size, int64_t k_block_size) {
  return (q_block_size == 128 && (k_block_size == 128 || k_block_size == 64)) ||
         (q_block_size == 64 && k_block_size == 64);
}

constexpr bool head_dim_supported(int64_t head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

// One TMA descriptor covers (rows, head_dim, heads, batch): 16-byte aligned strides and start.
inline bool tma_compatible(const TensorView& x) {
  const int64_t strides = x.batch_stride | x.head_stride | x.row_stride;
  return strides % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride > 0;
}

constexpr AttentionChoice choose_attention_kernel(const AttentionTraits& traits) {
  if (traits.sm < 80) {
    return {AttentionKernel::kUnsupported,
            "unsupported: the GPU's compute capability is under 8.0"};
  }
  if (!head_dim_supported(traits.head_dim)) {
    return {AttentionKernel::kUnsupported, "unsupported: head_dim must be 64, 128 or 256"};
  }
  if (!block_sizes_supported(traits.q_block_size, traits.k_block_size)) {
    return {AttentionKernel::kUnsupported,
            "unsupported: (q_block_size, k_block_size) must be (128, 128), (128, 64) or (64, 64)"};
  }
  if (traits.sm == 90 && traits.has_sm90 && traits.tma && traits.q_block_size == 128) {
    return {AttentionKernel::kSm90, "sm90"};
  }
  return {AttentionKernel::kSm80, "sm80"};
}

// KV heads whose tiles are interleaved: as many as share most of the L2 cache, so that all their
// query rows, longest first, run against K and V that stay in it. Evenly shared out, since a small
// last section would end in a few long rows.
inline int kv_section(int64_t k_len, int head_dim, int64_t kv_heads, int64_t l2_bytes) {
  const int64_t head_bytes = 2 * k_len * head_dim * 2;  // K and V, 2 bytes an element
  const int64_t fitting = head_bytes > 0 ? l2_bytes * 7 / 10 / head_bytes : kv_heads;
  if (fitting < 2) {
    return 1;
  }
  const int64_t sections = (kv_heads + fitting - 1) / fitting;
  return static_cast<int>((kv_heads + sections - 1) / sections);
}

}  // namespace prism
