// How each kernel file reports its kernels to introspect.h.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "kernels/introspect.h"

namespace prism {

// Appends what the runtime knows of `kernel` when launched with `threads` and `dynamic_smem`.
template <typename Kernel>
void describe_kernel(std::vector<KernelInfo>& kernels, std::string name, std::string tile,
                     Kernel* kernel, int threads, int dynamic_smem) {
  KernelInfo info;
  info.name = std::move(name);
  info.tile = std::move(tile);
  info.threads = threads;
  info.dynamic_smem = dynamic_smem;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    info.registers = attributes.numRegs;
    info.static_smem = static_cast<int>(attributes.sharedSizeBytes);
    info.local_bytes = static_cast<int>(attributes.localSizeBytes);
    info.ptx_version = attributes.ptxVersion;
    info.binary_version = attributes.binaryVersion;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_smem);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&info.blocks_per_sm, kernel, threads,
                                                          dynamic_smem);
  }
  if (error != cudaSuccess) {
    info.error = cudaGetErrorString(error);
    cudaGetLastError();
  }
  kernels.push_back(std::move(info));
}

// Implemented beside the kernels, from the lists that launches choose from.
void describe_bands(std::vector<KernelInfo>& kernels);
void describe_append_means(std::vector<KernelInfo>& kernels);
void describe_prepare_keys(std::vector<KernelInfo>& kernels);
void describe_grid(std::vector<KernelInfo>& kernels);
void describe_keep_blocks(std::vector<KernelInfo>& kernels);
void describe_sparse_attention(std::vector<KernelInfo>& kernels);

}  // namespace prism
