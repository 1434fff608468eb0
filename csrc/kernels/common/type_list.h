// Kernels as lists of types: launches and introspection read the same ones.
#pragma once

#include <cuda_runtime_api.h>

namespace prism {

template <typename... Types>
struct TypeList {
  // f(T()) for every T.
  template <typename F>
  static void for_each(F f) {
    (f(Types()), ...);
  }

  // launch(T()) for the first T of which fits(T()) holds.
  template <typename Fits, typename Launch>
  static cudaError_t launch_first(Fits fits, Launch launch) {
    cudaError_t error = cudaErrorInvalidValue;
    ((fits(Types()) && (error = launch(Types()), true)) || ...);
    return error;
  }
};

}  // namespace prism
