// Instantiated once for each head size, so that they compile in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/introspect.h"
#include "kernels/params.h"

namespace prism {

template <int kHeadDim>
cudaError_t launch_grid(const GridParams& params, int64_t ctas, int sm, cudaStream_t stream);

template <int kHeadDim>
cudaError_t launch_pool_cells(const PoolCellsParams& params, cudaStream_t stream);

template <int kHeadDim>
void describe_grid(std::vector<KernelInfo>& kernels);

}  // namespace prism
