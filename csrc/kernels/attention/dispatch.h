// Which attention kernel serves which call: pure functions, testable without a GPU.
#pragma once

#include "kernels/params.h"

namespace prism {

enum class AttentionKernel { kUnsupported, kSm80 };

struct AttentionChoice {
  AttentionKernel kernel;
  const char* name;  // "sm80", or "unsupported: <reason>"
};

constexpr bool block_sizes_supported(int64_t q_block_size, int64_t k_block_size) {
  return (q_block_size == 128 && (k_block_size == 128 || k_block_size == 64)) ||
         (q_block_size == 64 && k_block_size == 64);
}

constexpr bool head_dim_supported(int64_t head_dim) { return head_dim == 64 || head_dim == 128; }

constexpr AttentionChoice choose_attention_kernel(int sm, int64_t head_dim, int64_t q_block_size,
                                                  int64_t k_block_size) {
  if (sm < 80) {
    return {AttentionKernel::kUnsupported,
            "unsupported: the GPU's compute capability is under 8.0"};
  }
  if (!head_dim_supported(head_dim)) {
    return {AttentionKernel::kUnsupported, "unsupported: head_dim must be 64 or 128"};
  }
  if (!block_sizes_supported(q_block_size, k_block_size)) {
    return {AttentionKernel::kUnsupported,
            "unsupported: (q_block_size, k_block_size) must be (128, 128), (128, 64) or (64, 64)"};
  }
  return {AttentionKernel::kSm80, "sm80"};
}

}  // namespace prism
