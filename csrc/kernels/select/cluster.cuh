// The few cluster operations selection needs; a cluster of one CTA on every GPU.
#pragma once

#include <cooperative_groups.h>

namespace prism {

template <int kCluster>
struct Cluster {
  static __device__ int rank() { return static_cast<int>(blockIdx.x % kCluster); }

  // A barrier for all threads of the cluster that also makes their writes visible.
  static __device__ void sync() {
    if constexpr (kCluster == 1) {
      __syncthreads();
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      cooperative_groups::this_cluster().sync();
#endif
    }
  }

  // The address of CTA `peer`'s copy of a shared variable.
  template <typename T>
  static __device__ T* of_peer(T* shared, int peer) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (kCluster > 1) {
      return cooperative_groups::this_cluster().map_shared_rank(shared, peer);
    }
#endif
    return shared;
  }
};

}  // namespace prism
