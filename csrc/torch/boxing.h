// Boxed kernels whose arguments come in groups (arguments.h), as torch's stable ABI calls them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace prism {

// The arguments of a call, taken one after the other in the order of its schema.
class Stack {
 public:
  explicit Stack(const StableIValue* values) : values_(values) {}

  template <typename T>
  T take() {
    if constexpr (IsGroup<T>::value) {
      return T::take(*this);
    } else if constexpr (std::is_same_v<T, std::string>) {
      return take_string();
    } else {
      return torch::stable::detail::to<T>(values_[taken_++]);
    }
  }

  uint64_t taken() const { return taken_; }

 private:
  template <typename T, typename = void>
  struct IsGroup : std::false_type {};
  template <typename T>
  struct IsGroup<T, std::void_t<decltype(T::take(std::declval<Stack&>()))>> : std::true_type {};

  static void check(AOTITorchError error) {
    STD_TORCH_CHECK(error == TORCH_SUCCESS, "torch could not pass on a string");
  }

  // torch's own conversion allocates a string that nobody frees.
  std::string take_string() {
    const auto handle = torch::stable::detail::to<StringHandle>(values_[taken_++]);
    size_t length = 0;
    const char* data = nullptr;
    check(torch_string_length(handle, &length));
    check(torch_string_c_str(handle, &data));
    std::string text(data, length);
    check(torch_delete_string(handle));
    return text;
  }

  const StableIValue* values_;
  uint64_t taken_ = 0;
};

namespace detail {

template <typename Function>
struct Signature;

template <typename Result, typename... Parameters>
struct Signature<Result (*)(Parameters...)> {
  using Arguments = std::tuple<std::decay_t<Parameters>...>;

  static Arguments take(const StableIValue* values, uint64_t count) {
    Stack stack(values);
    Arguments arguments{stack.take<std::decay_t<Parameters>>()...};  // braces: in this order
    STD_TORCH_CHECK(stack.taken() == count, "the schema has ", count,
                    " arguments; the kernel took ", stack.taken());
    return arguments;
  }
};

inline void put(StableIValue* values, const torch::stable::Tensor& result) {
  values[0] = torch::stable::detail::from(result);
}

template <typename... Tensors>
void put(StableIValue* values, const std::tuple<Tensors...>& results) {
  std::apply(
      [&](const auto&... result) { ((*values++ = torch::stable::detail::from(result)), ...); },
      results);
}

}  // namespace detail

// Checks a call's arguments.
template <auto kCheck>
void boxed_check(StableIValue* values, uint64_t count, uint64_t /*outputs*/) {
  std::apply(kCheck, detail::Signature<decltype(kCheck)>::take(values, count));
}

// Checks a call's arguments and runs what that gives.
template <auto kCheck>
void boxed(StableIValue* values, uint64_t count, uint64_t /*outputs*/) {
  const auto arguments = detail::Signature<decltype(kCheck)>::take(values, count);
  const auto call = std::apply(kCheck, arguments);
  if constexpr (std::is_void_v<decltype(run(call))>) {
    run(call);
  } else {
    detail::put(values, run(call));
  }
}

}  // namespace prism
