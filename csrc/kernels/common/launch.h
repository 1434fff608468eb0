// Launches whose start overlaps the end of the kernel before them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace prism {

struct LaunchShape {
  int64_t grid;
  int threads;
  int smem_bytes;
  bool overlaps = false;  // starts before the kernel ahead has ended (9.0); see ptx.cuh
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape,
                          cudaStream_t stream, Arguments&&... arguments) {
  if (shape.grid > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = stream;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = shape.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Whether launches may overlap on a GPU of this compute capability (10 * major + minor). Code for
// 9.0 has to run there: what a newer GPU translates from PTX of 8.0 waits for nothing.
inline bool can_overlap([[maybe_unused]] int sm) {
#ifdef PRISM_HAS_SM90A
  return sm == 90;
#else
  return false;
#endif
}

}  // namespace prism
