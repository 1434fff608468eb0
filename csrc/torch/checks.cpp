#include "torch/checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/attention/dispatch.h"

namespace prism {

namespace {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() - 256;

template <typename List>
std::string list_string(const List& values) {
  std::ostringstream out;
  const char* separator = "(";
  for (const int64_t value : values) {
    out << std::exchange(separator, ", ") << value;
  }
  out << (values.size() > 0 ? ")" : "()");
  return out.str();
}

std::string device_string(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return "cpu";
  }
  if (tensor.is_cuda()) {
    return "cuda:" + std::to_string(tensor.get_device_index());
  }
  return "another device type";
}

}  // namespace

std::string shape_string(const Tensor& tensor) { return list_string(tensor.sizes()); }

void fail_without_kernels(const char* op, const Tensor& tensor) {
  if (tensor.is_cpu()) {
    fail(op, "CPU tensors are served by the Python package: import prism_cuda in this process");
  }
  fail(op,
       "this build has no CUDA kernels (it was made with PRISM_CPU_ONLY=1); rebuild without "
       "that variable, or pass CPU tensors");
}

void check_defined(const char* op, const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.defined(), op, name, " is None; expected a tensor");
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                 const char* words) {
  PRISM_CHECK(tensor.scalar_type() == dtype, op, name, " has dtype ",
              torch::headeronly::toString(tensor.scalar_type()), "; expected ", words);
}

void check_shape(const char* op, const char* name, const Tensor& tensor,
                 std::initializer_list<int64_t> shape, const char* meaning) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == shape.begin()[i];
  }
  PRISM_CHECK(same, op, name, " has shape ", shape_string(tensor), "; expected ",
              list_string(shape), ": ", meaning);
}

void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.is_contiguous(), op, name, " is not contiguous; expected contiguous");
}

void check_int_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                      std::initializer_list<int64_t> shape, const char* meaning) {
  check_same_device(op, name, tensor, "q", like);
  check_dtype(op, name, tensor, ScalarType::Int, "Int (int32)");
  check_shape(op, name, tensor, shape, meaning);
  check_contiguous(op, name, tensor);
}

bool is_fp8(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float8_e4m3fn; }

void check_heads(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                 const char* shape, Fp8 fp8) {
  check_defined(op, name, tensor);
  PRISM_CHECK(tensor.is_cpu() || tensor.is_cuda(), op, name, " is on ", device_string(tensor),
              "; allowed: cpu, cuda");
  const ScalarType dtype = tensor.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const bool allowed = half || (tensor.is_cpu() && dtype == ScalarType::Float) ||
                       (fp8 == Fp8::kAllowed && is_fp8(tensor));
  PRISM_CHECK(allowed, op, name, " has dtype ", torch::headeronly::toString(dtype), " on ",
              device_string(tensor), "; allowed: BFloat16, Half", tensor.is_cpu() ? ", Float" : "",
              fp8 == Fp8::kAllowed ? ", Float8_e4m3fn" : "");
  PRISM_CHECK(tensor.dim() == dims, op, name, " has shape ", shape_string(tensor), "; expected ",
              dims, " dimensions: ", shape);
  const int64_t head_dim = tensor.size(dims - 1);
  PRISM_CHECK(head_dim_supported(head_dim), op, name, " has head_dim ", head_dim, " (shape ",
              shape_string(tensor), "); allowed: multiples of 8 up to 256");
  PRISM_CHECK(tensor.stride(dims - 1) == 1 || tensor.numel() == 0, op, name, " has last stride ",
              tensor.stride(dims - 1), "; expected 1 (head_dim elements adjacent)");
}

void check_activation(const char* op, const char* name, const Tensor& tensor, Fp8 fp8) {
  check_heads(op, name, tensor, 4, "(batch, heads, length, head_dim)", fp8);
  PRISM_CHECK(tensor.size(2) <= kMaxLength, op, name, " has length ", tensor.size(2),
              "; allowed: at most ", kMaxLength);
}

void check_grid_head_dim(const char* op, const char* name, const Tensor& tensor) {
  constexpr int64_t kMaxGridHeadDim = 128;  // a warp holds its queries' statistics in registers
  const int64_t head_dim = tensor.size(tensor.dim() - 1);
  PRISM_CHECK(head_dim <= kMaxGridHeadDim, op, name, " has head_dim ", head_dim, " (shape ",
              shape_string(tensor), "); allowed on the grid: multiples of 8 up to ",
              kMaxGridHeadDim);
}

void check_same_device(const char* op, const char* name, const Tensor& tensor,
                       const char* other_name, const Tensor& other) {
  check_defined(op, name, tensor);
  const bool same = tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
                    (tensor.is_cpu() || tensor.get_device_index() == other.get_device_index());
  PRISM_CHECK(same, op, name, " is on ", device_string(tensor), " but ", other_name, " is on ",
              device_string(other), "; expected the same device");
}

void check_gqa(const char* op, int64_t q_heads, const char* kv_name, int64_t kv_heads) {
  PRISM_CHECK(kv_heads > 0 && q_heads % kv_heads == 0, op, "q has ", q_heads, " heads and ",
              kv_name, " has ", kv_heads, "; expected a multiple of ", kv_name, "'s heads");
}

void check_block_size(const char* op, const char* name, int64_t block_size) {
  PRISM_CHECK(block_size == 64 || block_size == 128, op, name, " is ", block_size,
              "; allowed: 64, 128");
}

void check_block_sizes(const char* op, const BlockArguments& blocks) {
  PRISM_CHECK(block_sizes_supported(blocks.q_block_size, blocks.k_block_size), op,
              "(q_block_size, k_block_size) is (", blocks.q_block_size, ", ", blocks.k_block_size,
              "); allowed: (128, 128), (128, 64), (64, 64)");
}

Band check_band(const char* op, const char* name, const std::vector<int64_t>& ranges,
                int64_t head_dim) {
  PRISM_CHECK(ranges.size() % 2 == 0 && ranges.size() <= 2 * kMaxBandRanges, op, name, " is ",
              list_string(ranges), "; expected at most ", kMaxBandRanges,
              " pairs of dimensions [start, end)");
  Band band;
  int64_t previous_end = 0;
  for (size_t i = 0; i < ranges.size(); i += 2) {
    const int64_t start = ranges[i];
    const int64_t end = ranges[i + 1];
    PRISM_CHECK(previous_end <= start && start < end && end <= head_dim, op, name, " is ",
                list_string(ranges), "; expected sorted, disjoint, non-empty ranges within [0, ",
                head_dim, ")");
    for (int64_t dim = start; dim < end; ++dim) {
      band.dims[dim / 64] |= uint64_t{1} << (dim % 64);
    }
    band.size += static_cast<int>(end - start);
    previous_end = end;
  }
  return band;
}

SelectionBands check_bands(const char* op, const BandArguments& bands, int64_t head_dim) {
  const SelectionBands checked{check_band(op, "high_band", bands.high, head_dim),
                               check_band(op, "low_band", bands.low, head_dim)};
  PRISM_CHECK(checked.high.size + checked.low.size > 0, op,
              "high_band and low_band are both empty; at least one must name dimensions");
  return checked;
}

namespace {

// Of one value for all heads, or one for each; whether they differ.
bool check_per_head(const char* op, const char* name, const std::vector<double>& values,
                    int64_t q_heads) {
  const auto count = static_cast<int64_t>(values.size());
  PRISM_CHECK(count == 1 || (count == q_heads && count > 0), op, name, " has ", count,
              " values; expected 1, or one for each of the ", q_heads, " query heads");
  bool differ = false;
  for (const double value : values) {
    differ |= value != values.front();
  }
  PRISM_CHECK(!differ || q_heads <= kMaxRuleHeads, op, name, " differs between ", q_heads,
              " query heads; allowed: at most ", kMaxRuleHeads);
  return differ;
}

}  // namespace

KeepRules check_rules(const char* op, const RuleArguments& rules, int64_t q_heads) {
  KeepRules checked;
  checked.per_head = check_per_head(op, "top_p", rules.top_p, q_heads);
  for (const double top_p : rules.top_p) {
    PRISM_CHECK(top_p >= 0.0 && top_p <= 1.0, op, "top_p is ", top_p,
                "; allowed: 0 to 1 inclusive");
  }
  if (rules.keep_above) {
    checked.per_head |= check_per_head(op, "keep_above", *rules.keep_above, q_heads);
    for (const double keep_above : *rules.keep_above) {
      PRISM_CHECK(keep_above > 0.0 && keep_above <= 1.0, op, "keep_above is ", keep_above,
                  "; allowed: None, or above 0 and up to 1");
    }
  }
  PRISM_CHECK(rules.keep_sink >= 0, op, "keep_sink is ", rules.keep_sink,
              "; allowed: 0 or more blocks");
  PRISM_CHECK(rules.keep_recent >= 0, op, "keep_recent is ", rules.keep_recent,
              "; allowed: 0 or more blocks");
  checked.keep_sink = rules.keep_sink;
  checked.keep_recent = rules.keep_recent;
  const auto of_head = [](const std::vector<double>& values, int64_t head) {
    return values[values.size() > 1 ? head : 0];
  };
  for (int64_t head = 0; head < (checked.per_head ? q_heads : 1); ++head) {
    checked.top_p[head] = of_head(rules.top_p, head);
    checked.keep_above[head] = rules.keep_above ? of_head(*rules.keep_above, head)
                                                : std::numeric_limits<double>::infinity();
  }
  return checked;
}

double check_scale(const char* op, std::optional<double> scale, int64_t head_dim) {
  const double value = scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  constexpr double kLog2E = 1.4426950408889634;  // the kernels multiply by it in float32
  PRISM_CHECK(value > 0.0 && std::isnormal(static_cast<float>(value * kLog2E)), op, "scale is ",
              value, "; allowed: finite and above 0, and neither under nor over float32's range");
  return value;
}

void check_head_scale(const char* op, const char* name, const std::optional<Tensor>& scale,
                      const char* x_name, const Tensor& x, int64_t heads) {
  if (!scale) {
    return;
  }
  PRISM_CHECK(is_fp8(x), op, name, " is given but ", x_name, " has dtype ",
              torch::headeronly::toString(x.scalar_type()), "; expected None, or ", x_name,
              " in Float8_e4m3fn");
  check_same_device(op, name, *scale, x_name, x);
  check_dtype(op, name, *scale, ScalarType::Float, "Float (float32)");
  check_shape(op, name, *scale, {heads}, "a scale for each head");
  check_contiguous(op, name, *scale);
}

}  // namespace prism
