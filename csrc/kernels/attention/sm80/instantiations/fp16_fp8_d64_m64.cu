#include "kernels/attention/sm80/kernel.cuh"

namespace prism::sm80 {

template cudaError_t launch_attention<cutlass::half_t, 64, 64, true>(const SparseAttentionParams&,
                                                                     cudaStream_t);
template void describe_attention<cutlass::half_t, 64, 64, true>(std::vector<KernelInfo>&);

}  // namespace prism::sm80
