#pragma once

#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace prism {

// Continues block means with new tokens; the same bits as launch_block_pool over all tokens.
// Deterministic.
cudaError_t launch_append_means(const AppendMeansParams& params, cudaStream_t stream);

}  // namespace prism
