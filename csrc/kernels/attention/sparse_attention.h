#pragma once

#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace prism {

// Block-sparse attention on the kernel that `choose_attention_kernel` names for GPUs of compute
// capability `sm` (10 * major + minor); cudaErrorNotSupported where it names none.
cudaError_t launch_sparse_attention(const SparseAttentionParams& params, int sm,
                                    cudaStream_t stream);

}  // namespace prism
