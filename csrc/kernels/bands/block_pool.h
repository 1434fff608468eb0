#pragma once

#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace prism {

// Means over blocks of tokens in float32. Deterministic; any strides, any length.
cudaError_t launch_block_pool(const BlockPoolParams& params, cudaStream_t stream);

}  // namespace prism
