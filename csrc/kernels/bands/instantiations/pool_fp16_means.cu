#include "kernels/bands/pool_blocks.cuh"

namespace prism {

template cudaError_t launch_pool<__half, PoolMode::kMeans>(const PoolArguments&, cudaStream_t);
template void describe_pool<__half, PoolMode::kMeans>(std::vector<KernelInfo>&);

}  // namespace prism
