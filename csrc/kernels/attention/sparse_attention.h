#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/dispatch.h"
#include "kernels/params.h"

namespace prism {

// Whether the Hopper kernel was compiled for sm_90a.
bool has_sm90_kernels();

// Unless PRISM_PORTABLE_ATTENTION is set. Asked at every call: benchmarks and tests run both
// kernels in one process.
bool may_use_sm90_kernels();

// What a launch returns if the driver cannot describe a tensor to TMA; nothing else returns it.
constexpr cudaError_t kTensorMapRefused = cudaErrorInvalidPitchValue;

// The kernel for this call on a GPU of compute capability `sm` (10 * major + minor).
AttentionChoice choose_attention_kernel(const SparseAttentionParams& params, int sm);

// Block-sparse attention on the kernel that `choose_attention_kernel` names;
// cudaErrorNotSupported where it names none.
cudaError_t launch_sparse_attention(const SparseAttentionParams& params, int sm,
                                    cudaStream_t stream);

}  // namespace prism
