// Selection kernels of one width, for heads of up to as many dimensions; instantiations/ compiles
// them in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/introspect.h"
#include "kernels/params.h"

namespace prism {

template <int kHeadDim>
cudaError_t select_bytes(const SelectBlocksParams& params, int64_t* bytes);

template <int kHeadDim>
cudaError_t launch_select(const SelectBlocksParams& params, int sm, cudaStream_t stream);

template <int kHeadDim>
void describe_select(std::vector<KernelInfo>& kernels);

}  // namespace prism
