// The CPU kernels are the Python package's reference implementation: the ops of namespace
// `prism_reference`, which have the same schemas and are called after the checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace prism {

// The results lie at the front of the returned stack as StableIValues, owned by the caller.
template <size_t kOutputs, typename... Args>
auto call_reference(const char* op, const Args&... args) {
  constexpr size_t kSlots = sizeof...(Args) > kOutputs ? sizeof...(Args) : kOutputs;
  std::array<StableIValue, kSlots> stack{torch::stable::detail::from(args)...};
  const std::string name = std::string("prism_reference::") + op;
  if (torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw std::runtime_error(std::string("prism::") + op +
                             ": the CPU kernel failed. CPU tensors are served by the Python "
                             "package: was prism_cuda imported in this process?");
  }
  return stack;
}

inline torch::stable::Tensor take_tensor(StableIValue value) {
  return torch::stable::detail::to<torch::stable::Tensor>(value);
}

}  // namespace prism
