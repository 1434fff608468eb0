// Argument checks of every op. They run for every device, before anything is allocated or
// launched, in a fixed order: device, dtype, shape, strides, values.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/params.h"
#include "torch/arguments.h"

namespace prism {

using torch::headeronly::ScalarType;

template <typename... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "prism::" << op << ": ";
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

// Where there is nothing to run a checked call on `tensor`'s device.
[[noreturn]] void fail_without_kernels(const char* op, const Tensor& tensor);

// What follows `op` is evaluated only where the condition does not hold.
#define PRISM_CHECK(condition, op, ...) \
  do {                                  \
    if (!(condition)) {                 \
      ::prism::fail(op, __VA_ARGS__);   \
    }                                   \
  } while (0)

// For a >= 0; does not overflow.
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

std::string shape_string(const Tensor& tensor);

enum class Fp8 { kRefused, kAllowed };

bool is_fp8(const Tensor& tensor);  // float8 e4m3

// Refuses None, which the stable ABI lets through as an undefined tensor.
void check_defined(const char* op, const char* name, const Tensor& tensor);

void check_same_device(const char* op, const char* name, const Tensor& tensor,
                       const char* other_name, const Tensor& other);

// `words` say which dtype it is.
void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                 const char* words);

// A tensor of exactly `shape`; `meaning` is the shape in words.
void check_shape(const char* op, const char* name, const Tensor& tensor,
                 std::initializer_list<int64_t> shape, const char* meaning);

void check_contiguous(const char* op, const char* name, const Tensor& tensor);

// An int32 tensor of exactly `shape`, contiguous, beside `like`.
void check_int_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                      std::initializer_list<int64_t> shape, const char* meaning);

// A tensor of `dims` dimensions, `shape` in words, whose last is head_dim, a multiple of 8 up to
// 256: on a device that there are kernels for, with unit last stride, bfloat16 or float16 (and
// float32 on the CPU), or float8 e4m3 where that is allowed.
void check_heads(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                 const char* shape, Fp8 fp8 = Fp8::kRefused);

// The same of (batch, heads, length, head_dim).
void check_activation(const char* op, const char* name, const Tensor& tensor,
                      Fp8 fp8 = Fp8::kRefused);

// The head_dim of an activation whose blocks are to be estimated on the grid.
void check_grid_head_dim(const char* op, const char* name, const Tensor& tensor);

// q and kv head counts, for messages that name the tensors they come from.
void check_gqa(const char* op, int64_t q_heads, const char* kv_name, int64_t kv_heads);

void check_block_size(const char* op, const char* name, int64_t block_size);
void check_block_sizes(const char* op, const BlockArguments& blocks);

// `ranges` is a flattened list of half-open dimension ranges, sorted and disjoint.
Band check_band(const char* op, const char* name, const std::vector<int64_t>& ranges,
                int64_t head_dim);

struct SelectionBands {
  Band high;
  Band low;
};
SelectionBands check_bands(const char* op, const BandArguments& bands, int64_t head_dim);

// What a selection keeps. A list of equal values counts as one value.
KeepRules check_rules(const char* op, const RuleArguments& rules, int64_t q_heads);

// The softmax scale, or head_dim^-1/2 where none is given.
double check_scale(const char* op, std::optional<double> scale, int64_t head_dim);

// What fp8 `x` is multiplied by: float32 (heads), contiguous, beside x. No other dtype has a scale.
void check_head_scale(const char* op, const char* name, const std::optional<Tensor>& scale,
                      const char* x_name, const Tensor& x, int64_t heads);

}  // namespace prism
