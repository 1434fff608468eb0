#include "kernels/attention/sparse_attention.h"

#include <cutlass/numeric_types.h>

#include <cstdlib>
#include <type_traits>

#include "kernels/attention/sm80/kernel.h"
#include "kernels/attention/sm90/kernel.h"
#include "kernels/describe.h"

namespace prism {

namespace {

template <typename Element, int kHeadDim>
cudaError_t launch_head_dim(AttentionKernel kernel, const SparseAttentionParams& params,
                            cudaStream_t stream) {
  if (kernel == AttentionKernel::kSm90) {
    if (params.softcap > 0.f || params.window_left >= 0) {
      return sm90::launch_attention<Element, kHeadDim, 64, true>(params, stream);
    }
    return params.k_block_size == 64
               ? sm90::launch_attention<Element, kHeadDim, 64>(params, stream)
               : sm90::launch_attention<Element, kHeadDim, 128>(params, stream);
  }
  if constexpr (kHeadDim == 256) {
    return sm80::launch_attention<Element, kHeadDim, 64>(params, stream);
  } else {
    return params.q_block_size == 64
               ? sm80::launch_attention<Element, kHeadDim, 64>(params, stream)
               : sm80::launch_attention<Element, kHeadDim, 128>(params, stream);
  }
}

template <typename Element, int kHeadDim>
cudaError_t launch_fp8(AttentionKernel kernel, const SparseAttentionParams& params,
                       cudaStream_t stream) {
  if constexpr (kHeadDim <= 128) {
    if (kernel == AttentionKernel::kSm90) {
      return params.k_block_size == 64
                 ? sm90::launch_attention_fp8<Element, kHeadDim, 64>(params, stream)
                 : sm90::launch_attention_fp8<Element, kHeadDim, 128>(params, stream);
    }
  }
  if constexpr (kHeadDim == 128) {
    if (params.q_block_size == 128) {
      return sm80::launch_attention<Element, kHeadDim, 128, true>(params, stream);
    }
  }
  return sm80::launch_attention<Element, kHeadDim, 64, true>(params, stream);
}

template <typename Element>
cudaError_t launch_dtype(AttentionKernel kernel, const SparseAttentionParams& params,
                         cudaStream_t stream) {
  const auto launch = [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    return params.kv_is_fp8 ? launch_fp8<Element, kHeadDim>(kernel, params, stream)
                            : launch_head_dim<Element, kHeadDim>(kernel, params, stream);
  };
  // A head_dim in between is padded with zeros in shared memory.
  if (params.head_dim <= 64) {
    return launch(std::integral_constant<int, 64>());
  }
  if (params.head_dim <= 128) {
    return launch(std::integral_constant<int, 128>());
  }
  return launch(std::integral_constant<int, 256>());
}

template <typename Element>
void describe_dtype(std::vector<KernelInfo>& kernels) {
  sm80::describe_attention<Element, 64, 64>(kernels);
  sm80::describe_attention<Element, 64, 128>(kernels);
  sm80::describe_attention<Element, 128, 64>(kernels);
  sm80::describe_attention<Element, 128, 128>(kernels);
  sm80::describe_attention<Element, 256, 64>(kernels);
  sm80::describe_attention<Element, 64, 64, true>(kernels);
  sm80::describe_attention<Element, 128, 64, true>(kernels);
  sm80::describe_attention<Element, 128, 128, true>(kernels);
  sm80::describe_attention<Element, 256, 64, true>(kernels);
  if (has_sm90_kernels()) {
    sm90::describe_attention<Element, 64, 64>(kernels);
    sm90::describe_attention<Element, 64, 128>(kernels);
    sm90::describe_attention<Element, 128, 64>(kernels);
    sm90::describe_attention<Element, 128, 128>(kernels);
    sm90::describe_attention<Element, 256, 64>(kernels);
    sm90::describe_attention<Element, 256, 128>(kernels);
    sm90::describe_attention_fp8<Element, 64, 64>(kernels);
    sm90::describe_attention_fp8<Element, 64, 128>(kernels);
    sm90::describe_attention_fp8<Element, 128, 64>(kernels);
    sm90::describe_attention_fp8<Element, 128, 128>(kernels);
    sm90::describe_attention<Element, 64, 64, true>(kernels);
    sm90::describe_attention<Element, 128, 64, true>(kernels);
    sm90::describe_attention<Element, 256, 64, true>(kernels);
  }
}

}  // namespace

bool has_sm90_kernels() {
#ifdef PRISM_HAS_SM90A
  return true;
#else
  return false;
#endif
}

bool may_use_sm90_kernels() {
  return has_sm90_kernels() && std::getenv("PRISM_PORTABLE_ATTENTION") == nullptr;
}

AttentionChoice choose_attention_kernel(const SparseAttentionParams& params, int sm) {
  const RaggedBatch& ragged = params.ragged;
  const int k_rows = ragged.is_paged()    ? ragged.pages
                     : ragged.is_ragged() ? ragged.total_k
                                          : params.k_len;
  const bool tma = k_rows > 0 && moves_16_bytes(params) &&
                   (!ragged.is_paged() || tma_pages_compatible(params.k, params.v, ragged));
  const bool has_sm90 = may_use_sm90_kernels();
  AttentionTraits traits{sm, params.head_dim, params.q_block_size, params.k_block_size, has_sm90,
                         tma};
  traits.fp8 = params.kv_is_fp8;
  traits.score_options = params.softcap > 0.f || params.window_left >= 0;
  return choose_attention_kernel(traits);
}

cudaError_t launch_sparse_attention(const SparseAttentionParams& params, int sm,
                                    cudaStream_t stream) {
  const AttentionChoice choice = choose_attention_kernel(params, sm);
  if (choice.kernel == AttentionKernel::kUnsupported) {
    return cudaErrorNotSupported;
  }
  const bool no_rows = params.ragged.is_ragged() && params.ragged.total_q == 0;
  if (params.batch == 0 || params.q_heads == 0 || params.q_len == 0 || no_rows) {
    return cudaSuccess;
  }
  return params.dtype == DType::kFloat16
             ? launch_dtype<cutlass::half_t>(choice.kernel, params, stream)
             : launch_dtype<cutlass::bfloat16_t>(choice.kernel, params, stream);
}

void describe_sparse_attention(std::vector<KernelInfo>& kernels) {
  describe_dtype<cutlass::bfloat16_t>(kernels);
  describe_dtype<cutlass::half_t>(kernels);
}

}  // namespace prism
