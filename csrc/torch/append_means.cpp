#include <cstdint>

#include "torch/cuda_context.h"
#include "torch/ops.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/bands/append_means.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "append_means_";

// Float32, contiguous, and like x but for the number of rows a head.
void check_state(const char* name, const Tensor& state, const Tensor& x) {
  check_same_device(kOp, name, state, "x", x);
  check_dtype(kOp, name, state, ScalarType::Float, "Float (float32)");
  PRISM_CHECK(state.dim() == 4 && state.size(0) == x.size(0) && state.size(1) == x.size(1) &&
                  state.size(3) == x.size(3),
              kOp, name, " has shape ", shape_string(state), "; expected (", x.size(0), ", ",
              x.size(1), ", rows, ", x.size(3), "), the batch, heads and head_dim of x");
  check_contiguous(kOp, name, state);
}

}  // namespace

AppendMeansCall check_append_means(const Tensor& x, const Tensor& means, const Tensor& sums,
                                   int64_t start, int64_t block_size,
                                   const std::optional<Tensor>& scale) {
  check_activation(kOp, "x", x, Fp8::kAllowed);
  check_state("means", means, x);
  check_state("sums", sums, x);
  check_block_size(kOp, "block_size", block_size);
  check_head_scale(kOp, "scale", scale, "x", x, x.size(1));
  PRISM_CHECK(start >= 0, kOp, "start is ", start, "; allowed: 0 or more tokens");
  PRISM_CHECK(x.size(2) <= means.size(2) * block_size - start, kOp, "means has ", means.size(2),
              " blocks; expected at least ceil((start + length of x) / block_size) = ceil((", start,
              " + ", x.size(2), ") / ", block_size, ")");
  PRISM_CHECK(sums.size(2) == running_sums(x.size(3)), kOp, "sums has ", sums.size(2),
              " rows; expected ", running_sums(x.size(3)), " for head_dim ", x.size(3),
              " (16 up to 64, 8 up to 128, 4 up to 256)");
  PRISM_CHECK(means.data_ptr() != sums.data_ptr() || means.numel() == 0, kOp,
              "means and sums are the same memory; expected two tensors");
  return {kOp, x, means, sums, start, block_size, scale};
}

#ifdef PRISM_WITH_CUDA
void run(const AppendMeansCall& call) {
  const Tensor& x = call.on;
  const CudaContext context(kOp, x);
  const NvtxRange range("prism.append_means");
  AppendMeansParams params;
  params.x = view(x);
  params.means = static_cast<float*>(call.means.data_ptr());
  params.sums = static_cast<float*>(call.sums.data_ptr());
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.start = call.start;
  params.length = x.size(2);
  params.capacity = call.means.size(2);
  params.head_dim = static_cast<int>(x.size(3));
  params.block_size = static_cast<int>(call.block_size);
  params.dtype = kernel_dtype(x);
  params.scale = float_data(call.scale);
  context.check(launch_append_means(params, context.stream()));
}
#endif

}  // namespace prism
