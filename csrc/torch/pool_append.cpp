#include <cstdint>

#include "torch/checks.h"
#include "torch/cuda_context.h"
#include "torch/ops.h"
#include "torch/reference.h"

#ifdef PRISM_WITH_CUDA
#include "kernels/pool/append_means.h"
#endif

namespace prism {

namespace {

constexpr const char* kOp = "pool_append_";

// Float32, contiguous, and like x but for the number of rows a head.
void check_state(const char* name, const Tensor& state, const Tensor& x) {
  check_same_device(kOp, name, state, "x", x);
  PRISM_CHECK(state.scalar_type() == ScalarType::Float, kOp, name, " has dtype ",
              torch::headeronly::toString(state.scalar_type()), "; expected Float (float32)");
  PRISM_CHECK(state.dim() == 4 && state.size(0) == x.size(0) && state.size(1) == x.size(1) &&
                  state.size(3) == x.size(3),
              kOp, name, " has shape ", shape_string(state), "; expected (", x.size(0), ", ",
              x.size(1), ", rows, ", x.size(3), "), the batch, heads and head_dim of x");
  PRISM_CHECK(state.is_contiguous(), kOp, name, " is not contiguous; expected contiguous");
}

}  // namespace

void pool_append_(const Tensor& x, Tensor means, Tensor sums, int64_t start, int64_t block_size,
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
  if (x.is_cpu()) {
    call_reference<0>(kOp, x, means, sums, start, block_size, scale);
    return;
  }
#ifdef PRISM_WITH_CUDA
  const CudaContext context(kOp, x);
  const NvtxRange range("prism.pool_append");
  AppendMeansParams params;
  params.x = view(x);
  params.means = static_cast<float*>(means.data_ptr());
  params.sums = static_cast<float*>(sums.data_ptr());
  params.batch = x.size(0);
  params.heads = x.size(1);
  params.start = start;
  params.length = x.size(2);
  params.capacity = means.size(2);
  params.head_dim = static_cast<int>(x.size(3));
  params.block_size = static_cast<int>(block_size);
  params.dtype = kernel_dtype(x);
  params.scale = scale ? static_cast<const float*>(scale->data_ptr()) : nullptr;
  context.check(launch_append_means(params, context.stream()));
#else
  fail_without_cuda(kOp);
#endif
}

}  // namespace prism
