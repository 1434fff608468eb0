#pragma once

#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace prism {

// Bits and counts of every key block that some row of a query block sees: through the causal mask
// and the window, of its sequence's length; 0 past its end. Of all sequences, or after a selection
// of those that are short: of fewer keys than dense_below, or fewer queries than a block.
cudaError_t launch_keep_blocks(const KeepBlocksParams& params, cudaStream_t stream);

}  // namespace prism
