#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "kernels/introspect.h"
#include "kernels/params.h"

namespace prism::sm80 {

// One instantiation of the portable kernel: kTileM is the query block size, or half of it. kFp8: k
// and v are float8 e4m3. Instantiated under instantiations/, a file for each type and head_dim:
// they compile in parallel, and few enough that reading the headers costs less than compiling.
template <typename Element, int kHeadDim, int kTileM, bool kFp8 = false>
cudaError_t launch_attention(const SparseAttentionParams& params, cudaStream_t stream);

template <typename Element, int kHeadDim, int kTileM, bool kFp8 = false>
void describe_attention(std::vector<KernelInfo>& kernels);

}  // namespace prism::sm80
