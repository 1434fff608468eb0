#pragma once

#include <cuda_runtime_api.h>

#include "kernels/bands/workspace.h"
#include "kernels/params.h"

namespace prism {

// Fills the keys' part of the workspace from finished means, as pooling does from k.
cudaError_t launch_prepare_keys(const BandsParams& params, const BandsWorkspace& workspace,
                                cudaStream_t stream);

}  // namespace prism
