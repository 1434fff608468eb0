#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// The size of the workspace that selection needs on the current device.
cudaError_t select_workspace_bytes(const SelectBlocksParams& params, int64_t* bytes);

// Fills the workspace from finished means, as launch_estimate_pool does from q and k.
cudaError_t launch_prepare_means(const SelectBlocksParams& params, cudaStream_t stream);

// Calibrated dual-band top-p selection: q_means and workspace in, packed block mask out. Has to
// follow the launch that filled the workspace, in its stream. Deterministic. `sm` is 10 * major +
// minor of the current device: launches overlap at 90 (launch.h).
cudaError_t launch_select_blocks(const SelectBlocksParams& params, int sm, cudaStream_t stream);

}  // namespace prism
