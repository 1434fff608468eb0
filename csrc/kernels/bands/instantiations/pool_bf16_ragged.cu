#include "kernels/bands/pool_blocks.cuh"

namespace prism {

template cudaError_t launch_pool<__nv_bfloat16, PoolMode::kRagged>(const PoolArguments&,
                                                                   cudaStream_t);
template void describe_pool<__nv_bfloat16, PoolMode::kRagged>(std::vector<KernelInfo>&);

}  // namespace prism
