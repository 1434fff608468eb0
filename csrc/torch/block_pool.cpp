#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/reference.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/pool/block_pool.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "block_pool";

#ifdef PRISM_WITH_CUDA
Tensor block_pool_cuda(const Tensor& x, int64_t block_size, const std::optional<Tensor>& scale) {
  const CudaContext context(kOp, x);
  const NvtxRange range("prism.pool");
  Tensor means = new_empty(x, {x.size(0), x.size(1), ceil_div(x.size(2), block_size), x.size(3)},
                           ScalarType::Float);
  BlockPoolParams params;
  params.x = view(x);
  params.means = static_cast<float*>(means.data_ptr());
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.length = x.size(2);
  params.head_dim = static_cast<int>(x.size(3));
  params.block_size = static_cast<int>(block_size);
  params.dtype = kernel_dtype(x);
  params.scale = scale ? static_cast<const float*>(scale->data_ptr()) : nullptr;
  context.check(launch_block_pool(params, context.stream()));
  return means;
}
#endif

}  // namespace

Tensor block_pool(const Tensor& x, int64_t block_size, const std::optional<Tensor>& scale) {
  check_activation(kOp, "x", x, Fp8::kAllowed);
  check_block_size(kOp, "block_size", block_size);
  check_head_scale(kOp, "scale", scale, "x", x, x.size(1));
  if (x.is_cpu()) {
    return take_tensor(call_reference<1>(kOp, x, block_size, scale)[0]);
  }
#ifdef PRISM_WITH_CUDA
  return block_pool_cuda(x, block_size, scale);
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
