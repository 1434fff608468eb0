#include "kernels/bands/pool_blocks.cuh"

namespace prism {

template cudaError_t launch_pool<__half, PoolMode::kEnergies>(const PoolArguments&, cudaStream_t);
template void describe_pool<__half, PoolMode::kEnergies>(std::vector<KernelInfo>&);

}  // namespace prism
