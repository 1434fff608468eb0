// Selection kernels of one width, for heads of up to as many dimensions; instantiations/ compiles
// them in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/introspect.h"
#include "kernels/params.h"

namespace prism {

// Rows of score strips that the workspace has to hold: those of all CTAs that select long rows.
template <int kHeadDim>
cudaError_t count_strip_rows(const SelectParams& params, int64_t* rows);

// Follows the launches that fill the workspace.
template <int kHeadDim>
cudaError_t launch_select_rows(const BandsParams& params, int sm, cudaStream_t stream);

template <int kHeadDim>
void describe_select_rows(std::vector<KernelInfo>& kernels);

}  // namespace prism
