#pragma once

#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace prism {

// Calibrated dual-band top-p selection: block means in, packed block mask out. Deterministic.
cudaError_t launch_select_blocks(const SelectBlocksParams& params, cudaStream_t stream);

}  // namespace prism
