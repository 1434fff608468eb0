#include "kernels/attention/sparse_attention.h"

#include <cutlass/numeric_types.h>

#include "kernels/attention/dispatch.h"
#include "kernels/attention/sm80/kernel.h"
#include "kernels/describe.h"

namespace prism {

namespace {

template <typename Element, int kHeadDim>
cudaError_t launch_sm80(const SparseAttentionParams& params, cudaStream_t stream) {
  return params.q_block_size == 64
             ? sm80::launch_attention<Element, kHeadDim, 64>(params, stream)
             : sm80::launch_attention<Element, kHeadDim, 128>(params, stream);
}

template <typename Element>
cudaError_t launch_sm80(const SparseAttentionParams& params, cudaStream_t stream) {
  return params.head_dim == 64 ? launch_sm80<Element, 64>(params, stream)
                               : launch_sm80<Element, 128>(params, stream);
}

template <typename Element>
void describe_sm80(std::vector<KernelInfo>& kernels) {
  sm80::describe_attention<Element, 64, 64>(kernels);
  sm80::describe_attention<Element, 64, 128>(kernels);
  sm80::describe_attention<Element, 128, 64>(kernels);
  sm80::describe_attention<Element, 128, 128>(kernels);
}

}  // namespace

cudaError_t launch_sparse_attention(const SparseAttentionParams& params, int sm,
                                    cudaStream_t stream) {
  const AttentionChoice choice = choose_attention_kernel(sm, params.head_dim, params.q_block_size,
                                                         params.k_block_size);
  switch (choice.kernel) {
    case AttentionKernel::kSm80:
      return params.dtype == DType::kFloat16 ? launch_sm80<cutlass::half_t>(params, stream)
                                             : launch_sm80<cutlass::bfloat16_t>(params, stream);
    case AttentionKernel::kUnsupported:
      break;
  }
  return cudaErrorNotSupported;
}

void describe_sparse_attention(std::vector<KernelInfo>& kernels) {
  describe_sm80<cutlass::bfloat16_t>(kernels);
  describe_sm80<cutlass::half_t>(kernels);
}

}  // namespace prism
