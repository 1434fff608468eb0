// What the attention ops share once their arguments are checked.
#pragma once

#include "torch/cuda_context.h"

#ifdef PRISM_WITH_CUDA

#include "kernels/attention/sparse_attention.h"

namespace prism {

// An output like q, with unit last stride.
Tensor make_output(const Tensor& q);

// What the kernels need to know of fp8 k and v.
void set_fp8(const Tensor& k, const std::optional<Tensor>& k_scale,
             const std::optional<Tensor>& v_scale, SparseAttentionParams& params);

// Chooses a kernel, allocates its workspace beside q and launches it.
void run_attention(const char* op, const CudaContext& context, const Tensor& q,
                   SparseAttentionParams& params);

}  // namespace prism

#endif  // PRISM_WITH_CUDA
