// Argument checks of every op. They run for every device, before anything is allocated or
// launched, in a fixed order: device, dtype, shape, strides, values.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/params.h"

namespace prism {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "prism::" << op << ": ";
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

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

// A tensor of `dims` dimensions, `shape` in words, whose last is head_dim: on a device that there
// are kernels for, with unit last stride, bfloat16 or float16 (and float32 on the CPU), or
// float8 e4m3 where that is allowed.
void check_heads(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                 const char* shape, Fp8 fp8 = Fp8::kRefused);

// q, k or v: (batch, heads, length, head_dim) with unit last stride, bfloat16 or float16 (and
// float32 on the CPU), a
// head_dim that is a multiple of 8 up to 256.
void check_activation(const char* op, const char* name, const Tensor& tensor,
                      Fp8 fp8 = Fp8::kRefused);

bool is_fp8(const Tensor& tensor);  // float8 e4m3

// The head_dim of an activation whose blocks are to be estimated on the grid.
void check_grid_head_dim(const char* op, const char* name, const Tensor& tensor);

// q and k of one call: one device and dtype, agreeing shapes, whole GQA groups.
void check_qk(const char* op, const Tensor& q, const Tensor& k, Fp8 fp8 = Fp8::kRefused);

// q, k, v of one call: one device, agreeing shapes, whole GQA groups; k and v of one dtype, q's or
// float8 e4m3.
void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v);

// q and kv head counts, for messages that name the tensors they come from.
void check_gqa(const char* op, const char* q_name, int64_t q_heads, const char* kv_name,
               int64_t kv_heads);

// Refuses None, which the stable ABI lets through as an undefined tensor.
void check_defined(const char* op, const char* name, const Tensor& tensor);

void check_same_device(const char* op, const char* name, const Tensor& tensor,
                       const char* other_name, const Tensor& other);

void check_block_size(const char* op, const char* name, int64_t block_size);
void check_block_sizes(const char* op, int64_t q_block_size, int64_t k_block_size);

// `ranges` is a flattened list of half-open dimension ranges, sorted and disjoint.
Band check_band(const char* op, const char* name, const std::vector<int64_t>& ranges,
                int64_t head_dim);

// What a selection keeps.
void check_rules(const char* op, double top_p, int64_t keep_sink, int64_t keep_recent,
                 std::optional<double> keep_above);

// Settings shared by select_blocks and prefill. Fills both bands.
struct SelectionBands {
  Band high;
  Band low;
};
SelectionBands check_selection(const char* op, const std::vector<int64_t>& high_band,
                               const std::vector<int64_t>& low_band, int64_t head_dim, double top_p,
                               int64_t keep_sink, int64_t keep_recent,
                               std::optional<double> keep_above);

// The softmax scale, or head_dim^-1/2 where none is given.
double check_scale(const char* op, std::optional<double> scale, int64_t head_dim);

// What changes scores before the softmax, as the kernels take it.
struct ScoreOptions {
  float softcap;    // 0: none
  int window_left;  // -1: all keys
};
ScoreOptions check_scores(const char* op, std::optional<double> softcap,
                          std::optional<int64_t> window_left, int64_t k_len);

// The logits added to the softmax denominators: float32 (q_heads), contiguous, beside q.
void check_sinks(const char* op, const std::optional<Tensor>& sinks, const Tensor& q,
                 int64_t q_heads);

// What the fp8 tensor `x` is multiplied by: float32 (heads), contiguous, beside x. No other dtype
// has a scale.
void check_head_scale(const char* op, const char* name, const std::optional<Tensor>& scale,
                      const char* x_name, const Tensor& x, int64_t heads);

// The scales of k and of v, which both have this many heads.
void check_kv_scales(const char* op, const Tensor& k, const Tensor& v, int64_t kv_heads,
                     const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale);

// A tensor of exactly `shape`.
void check_shape(const char* op, const char* name, const Tensor& tensor,
                 const std::vector<int64_t>& shape, const char* meaning);

// An int32 tensor.
void check_int32(const char* op, const char* name, const Tensor& tensor);

// k or v, which have device, dtype (but for fp8) and head_dim in common with q.
void check_like_q(const char* op, const char* name, const Tensor& tensor, const Tensor& q,
                  Fp8 fp8 = Fp8::kRefused);

// v, which has k's dtype.
void check_v_dtype(const char* op, const Tensor& k, const Tensor& v);

// An int32 tensor of exactly `shape`, contiguous.
void check_int_tensor(const char* op, const char* name, const Tensor& tensor,
                      const std::vector<int64_t>& shape, const char* meaning);

}  // namespace prism
