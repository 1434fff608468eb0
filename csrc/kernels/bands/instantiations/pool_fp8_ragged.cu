#include "kernels/bands/pool_blocks.cuh"

namespace prism {

template cudaError_t launch_pool<Fp8Code, PoolMode::kRagged>(const PoolArguments&, cudaStream_t);
template void describe_pool<Fp8Code, PoolMode::kRagged>(std::vector<KernelInfo>&);

}  // namespace prism
