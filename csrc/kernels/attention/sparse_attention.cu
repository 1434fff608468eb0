#include "kernels/attention/sparse_attention.h"

#include <cutlass/numeric_types.h>

#include <cstdlib>

#include "kernels/attention/sm80/kernel.h"
#include "kernels/attention/sm90/kernel.h"
#include "kernels/common/type_list.h"
#include "kernels/describe.h"

namespace prism {

namespace {

// An instantiation of the portable kernel.
template <typename Element, int kHeadDim, int kTileM, bool kFp8 = false>
struct Sm80Kernel {
  // A head_dim in between is padded with zeros in shared memory.
  static bool fits(AttentionKernel kernel, const SparseAttentionParams& params) {
    // Tiles of 64 rows also divide query blocks of 128.
    return kernel == AttentionKernel::kSm80 && params.kv_is_fp8 == kFp8 &&
           params.head_dim <= kHeadDim && (kTileM == 64 || params.q_block_size == kTileM);
  }
  static cudaError_t launch(const SparseAttentionParams& params, cudaStream_t stream) {
    return sm80::launch_attention<Element, kHeadDim, kTileM, kFp8>(params, stream);
  }
  static void describe(std::vector<KernelInfo>& kernels) {
    sm80::describe_attention<Element, kHeadDim, kTileM, kFp8>(kernels);
  }
};

// Of the Hopper kernel. kScoreOptions: with a softcap or a window, for blocks of either size.
template <typename Element, int kHeadDim, int kBlockN, bool kScoreOptions = false>
struct Sm90Kernel {
  static bool fits(AttentionKernel kernel, const SparseAttentionParams& params) {
    const bool options = params.softcap > 0.f || params.window_left >= 0;
    return kernel == AttentionKernel::kSm90 && !params.kv_is_fp8 && params.head_dim <= kHeadDim &&
           kScoreOptions == options && (kScoreOptions || params.k_block_size == kBlockN);
  }
  static cudaError_t launch(const SparseAttentionParams& params, cudaStream_t stream) {
    return sm90::launch_attention<Element, kHeadDim, kBlockN, kScoreOptions>(params, stream);
  }
  static void describe(std::vector<KernelInfo>& kernels) {
    if (has_sm90_kernels()) {
      sm90::describe_attention<Element, kHeadDim, kBlockN, kScoreOptions>(kernels);
    }
  }
};

template <typename Element, int kHeadDim, int kBlockN>
struct Sm90Fp8Kernel {
  static bool fits(AttentionKernel kernel, const SparseAttentionParams& params) {
    return kernel == AttentionKernel::kSm90 && params.kv_is_fp8 && params.head_dim <= kHeadDim &&
           params.k_block_size == kBlockN;
  }
  static cudaError_t launch(const SparseAttentionParams& params, cudaStream_t stream) {
    return sm90::launch_attention_fp8<Element, kHeadDim, kBlockN>(params, stream);
  }
  static void describe(std::vector<KernelInfo>& kernels) {
    if (has_sm90_kernels()) {
      sm90::describe_attention_fp8<Element, kHeadDim, kBlockN>(kernels);
    }
  }
};

// In the order of choice: the narrowest head that fits, and the most rows a tile.
template <typename T>
using KernelsOf =
    TypeList<Sm80Kernel<T, 64, 128>, Sm80Kernel<T, 64, 64>, Sm80Kernel<T, 128, 128>,
             Sm80Kernel<T, 128, 64>, Sm80Kernel<T, 256, 64>,                         //
             Sm80Kernel<T, 64, 64, true>, Sm80Kernel<T, 128, 128, true>,             //
             Sm80Kernel<T, 128, 64, true>, Sm80Kernel<T, 256, 64, true>,             //
             Sm90Kernel<T, 64, 64>, Sm90Kernel<T, 64, 128>, Sm90Kernel<T, 128, 64>,  //
             Sm90Kernel<T, 128, 128>, Sm90Kernel<T, 256, 64>, Sm90Kernel<T, 256, 128>,
             Sm90Kernel<T, 64, 64, true>, Sm90Kernel<T, 128, 64, true>,  //
             Sm90Kernel<T, 256, 64, true>,                               //
             Sm90Fp8Kernel<T, 64, 64>, Sm90Fp8Kernel<T, 64, 128>,        //
             Sm90Fp8Kernel<T, 128, 64>, Sm90Fp8Kernel<T, 128, 128>>;

template <typename Element>
cudaError_t launch_element(AttentionKernel kernel, const SparseAttentionParams& params,
                           cudaStream_t stream) {
  return KernelsOf<Element>::launch_first(
      [&](auto instance) { return instance.fits(kernel, params); },
      [&](auto instance) { return instance.launch(params, stream); });
}

template <typename Element>
void describe_element(std::vector<KernelInfo>& kernels) {
  KernelsOf<Element>::for_each([&](auto instance) { instance.describe(kernels); });
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
             ? launch_element<cutlass::half_t>(choice.kernel, params, stream)
             : launch_element<cutlass::bfloat16_t>(choice.kernel, params, stream);
}

void describe_sparse_attention(std::vector<KernelInfo>& kernels) {
  describe_element<cutlass::bfloat16_t>(kernels);
  describe_element<cutlass::half_t>(kernels);
}

}  // namespace prism
