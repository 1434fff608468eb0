// Loads the ops library and calls it through the installed header. With top_p = 1 every
// block is kept, so the result has to equal dense attention.
//
//   prefill_example LIBRARY      prism_cuda/_C.abi3.so, or libprism_ops.so of the CMake build
//
// Exit status: 0 equal, 1 different or failed, 77 no CUDA device.
#include <ATen/ATen.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>

#include "prism_cuda/prefill.h"

namespace {

int run(const char* library) {
  // The library registers its ops as it is loaded.
  if (dlopen(library, RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "cannot load %s: %s\n", library, dlerror());
    return 1;
  }
  c10::Dispatcher::singleton().findSchemaOrThrow("prism::prefill", "");
  std::printf("%s has prism::prefill\n", library);
  if (!at::hasCUDA()) {
    const at::Tensor x = at::zeros({1, 2, 256, 64});
    try {
      prism_cuda::prefill(x, x, x);
    } catch (const std::exception& refusal) {
      std::printf("skipped: no CUDA device, and of CPU tensors the op says\n%s\n", refusal.what());
    }
    return 77;
  }

  const at::NoGradGuard no_grad;
  const auto options = at::TensorOptions().device(at::kCUDA).dtype(at::kBFloat16);
  const at::Tensor q = at::randn({1, 8, 4096, 128}, options);
  const at::Tensor k = at::randn({1, 2, 4096, 128}, options);
  const at::Tensor v = at::randn({1, 2, 4096, 128}, options);
  prism_cuda::PrefillOptions keep_all;
  keep_all.top_p = {1.0};
  const auto [out, lse, bits, counts] = prism_cuda::prefill(q, k, v, keep_all);

  const at::Tensor dense = at::scaled_dot_product_attention(
      q.to(at::kFloat), k.to(at::kFloat).repeat_interleave(4, 1),
      v.to(at::kFloat).repeat_interleave(4, 1), std::nullopt, 0.0, /*is_causal=*/true);
  const double error = (out.to(at::kFloat) - dense).abs().max().item<double>();
  const bool equal = error < 2e-2;  // some roundings of bfloat16 at |out| up to about 4
  std::printf(
      "prefill of %ld tokens, %ld blocks computed: largest difference from dense %.4f, %s\n",
      static_cast<long>(q.size(2)), static_cast<long>(counts.sum().item<int64_t>()), error,
      equal ? "as expected" : "too large");
  return equal ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s LIBRARY\n", argv[0]);
    return 1;
  }
  try {
    return run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
