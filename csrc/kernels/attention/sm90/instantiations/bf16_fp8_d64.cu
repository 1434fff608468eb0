#include "kernels/attention/sm90/kernel.cuh"

namespace prism::sm90 {

template cudaError_t launch_attention_fp8<cutlass::bfloat16_t, 64, 128>(
    const SparseAttentionParams&, cudaStream_t);
template void describe_attention_fp8<cutlass::bfloat16_t, 64, 128>(std::vector<KernelInfo>&);

template cudaError_t launch_attention_fp8<cutlass::bfloat16_t, 64, 64>(const SparseAttentionParams&,
                                                                       cudaStream_t);
template void describe_attention_fp8<cutlass::bfloat16_t, 64, 64>(std::vector<KernelInfo>&);

}  // namespace prism::sm90
