#include "kernels/bands/pool_blocks.cuh"

namespace prism {

template cudaError_t launch_pool<__nv_bfloat16, PoolMode::kEnergies>(const PoolArguments&,
                                                                     cudaStream_t);
template void describe_pool<__nv_bfloat16, PoolMode::kEnergies>(std::vector<KernelInfo>&);

}  // namespace prism
