#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Bytes of params.select.workspace on the current device.
cudaError_t grid_workspace_bytes(const GridParams& params, int64_t* bytes);

// Pools the cells of keys from `first_cell` on: what launch_select_grid takes as k_cells.
cudaError_t launch_pool_cells(const PoolCellsParams& params, cudaStream_t stream);

// A block mask from q and k: the largest share of a key block in any softmax over means of 16
// queries and 16 keys, with the keys' spread; top-p or a threshold on these shares, scaled to sum
// to 1; sink and recent blocks. Two launches. Of a ragged batch every sequence keeps what it would
// keep alone; rows and words past its end are 0. Deterministic. `sm` is 10 * major + minor of the
// current device: launches overlap at 90 (common/launch.h).
cudaError_t launch_select_grid(const GridParams& params, int sm, cudaStream_t stream);

}  // namespace prism
