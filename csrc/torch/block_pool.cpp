#include <cstdint>

#include "torch/cuda_context.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/bands/block_pool.h"
#endif

namespace prism {

BlockPoolCall check_block_pool(const Tensor& x, int64_t block_size,
                               const std::optional<Tensor>& scale) {
  constexpr const char* kOp = "block_pool";
  check_activation(kOp, "x", x, Fp8::kAllowed);
  check_block_size(kOp, "block_size", block_size);
  check_head_scale(kOp, "scale", scale, "x", x, x.size(1));
  return {kOp, x, block_size, scale};
}

#ifdef PRISM_WITH_CUDA
Tensor run(const BlockPoolCall& call) {
  const Tensor& x = call.on;
  const CudaContext context(call.op, x);
  const NvtxRange range("prism.pool");
  Tensor means =
      new_empty(x, {x.size(0), x.size(1), ceil_div(x.size(2), call.block_size), x.size(3)},
                ScalarType::Float);
  BlockPoolParams params;
  params.x = view(x);
  params.means = static_cast<float*>(means.data_ptr());
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.length = x.size(2);
  params.head_dim = static_cast<int>(x.size(3));
  params.block_size = static_cast<int>(call.block_size);
  params.dtype = kernel_dtype(x);
  params.scale = float_data(call.scale);
  context.check(launch_block_pool(params, context.stream()));
  return means;
}
#endif

}  // namespace prism
