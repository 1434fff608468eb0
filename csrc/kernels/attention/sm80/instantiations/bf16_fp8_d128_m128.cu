#include "kernels/attention/sm80/kernel.cuh"

namespace prism::sm80 {

template cudaError_t launch_attention<cutlass::bfloat16_t, 128, 128, true>(
    const SparseAttentionParams&, cudaStream_t);
template void describe_attention<cutlass::bfloat16_t, 128, 128, true>(std::vector<KernelInfo>&);

}  // namespace prism::sm80
