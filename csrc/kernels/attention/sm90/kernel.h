#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "kernels/introspect.h"
#include "kernels/params.h"

namespace prism::sm90 {

// One instantiation of the Hopper kernel: 128 query rows a tile, kBlockN is the key block size.
// kScoreOptions: with softcap and windows, and every key block size that kBlockN divides.
// Instantiated under instantiations/, in files that compile in parallel.
template <typename Element, int kHeadDim, int kBlockN, bool kScoreOptions = false>
cudaError_t launch_attention(const SparseAttentionParams& params, cudaStream_t stream);

template <typename Element, int kHeadDim, int kBlockN, bool kScoreOptions = false>
void describe_attention(std::vector<KernelInfo>& kernels);

// The same for float8 e4m3 keys and values, up to head_dim 128.
template <typename Element, int kHeadDim, int kBlockN>
cudaError_t launch_attention_fp8(const SparseAttentionParams& params, cudaStream_t stream);

template <typename Element, int kHeadDim, int kBlockN>
void describe_attention_fp8(std::vector<KernelInfo>& kernels);

}  // namespace prism::sm90
