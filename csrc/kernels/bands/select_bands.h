#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Bytes of params.select.workspace on the current device.
cudaError_t bands_workspace_bytes(const BandsParams& params, int64_t* bytes);

// A block mask from q and k, or from q and means of k: pools what is to be pooled, then calibrated
// dual-band top-p selection. Two launches; three of fp8 keys and of means. Of a ragged batch every
// sequence keeps what it would keep alone; rows and words past its end are 0. Deterministic. `sm`
// is 10 * major + minor of the current device: launches overlap at 90 (common/launch.h).
cudaError_t launch_select_bands(const BandsParams& params, int sm, cudaStream_t stream);

}  // namespace prism
