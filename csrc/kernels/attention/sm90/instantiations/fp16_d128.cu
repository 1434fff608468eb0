#include "kernels/attention/sm90/kernel.cuh"

namespace prism::sm90 {

template cudaError_t launch_attention<cutlass::half_t, 128, 128>(const SparseAttentionParams&,
                                                                 cudaStream_t);
template void describe_attention<cutlass::half_t, 128, 128>(std::vector<KernelInfo>&);

template cudaError_t launch_attention<cutlass::half_t, 128, 64>(const SparseAttentionParams&,
                                                                cudaStream_t);
template void describe_attention<cutlass::half_t, 128, 64>(std::vector<KernelInfo>&);

}  // namespace prism::sm90
