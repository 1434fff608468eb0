#include "torch/checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/attention/dispatch.h"

namespace prism {

namespace {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() - 256;

std::string list_string(const int64_t* values, size_t count) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < count; ++i) {
    out << (i ? ", " : "") << values[i];
  }
  out << ')';
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

std::string shape_string(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return list_string(sizes.data(), sizes.size());
}

void check_defined(const char* op, const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.defined(), op, name, " is None; expected a tensor");
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

void check_gqa(const char* op, const char* q_name, int64_t q_heads, const char* kv_name,
               int64_t kv_heads) {
  PRISM_CHECK(kv_heads > 0 && q_heads % kv_heads == 0, op, q_name, " has ", q_heads, " heads and ",
              kv_name, " has ", kv_heads, "; expected a multiple of ", kv_name, "'s heads");
}

void check_like_q(const char* op, const char* name, const Tensor& tensor, const Tensor& q,
                  Fp8 fp8) {
  check_same_device(op, name, tensor, "q", q);
  const bool same = tensor.scalar_type() == q.scalar_type();
  PRISM_CHECK(same || (fp8 == Fp8::kAllowed && is_fp8(tensor)), op, name, " has dtype ",
              torch::headeronly::toString(tensor.scalar_type()), "; expected q's, ",
              torch::headeronly::toString(q.scalar_type()),
              fp8 == Fp8::kAllowed ? ", or Float8_e4m3fn" : "");
  const int64_t head_dim = tensor.size(tensor.dim() - 1);
  PRISM_CHECK(head_dim == q.size(q.dim() - 1), op, name, " has head_dim ", head_dim,
              "; expected q's, ", q.size(q.dim() - 1));
}

void check_v_dtype(const char* op, const Tensor& k, const Tensor& v) {
  PRISM_CHECK(v.scalar_type() == k.scalar_type(), op, "v has dtype ",
              torch::headeronly::toString(v.scalar_type()), "; expected k's, ",
              torch::headeronly::toString(k.scalar_type()));
}

namespace {

void check_batch(const char* op, const char* name, const Tensor& tensor, const Tensor& q) {
  PRISM_CHECK(tensor.size(0) == q.size(0), op, name, " has batch size ", tensor.size(0),
              "; expected q's, ", q.size(0));
}

}  // namespace

void check_qk(const char* op, const Tensor& q, const Tensor& k, Fp8 fp8) {
  check_activation(op, "q", q);
  check_activation(op, "k", k, fp8);
  check_like_q(op, "k", k, q, fp8);
  check_batch(op, "k", k, q);
  check_gqa(op, "q", q.size(1), "k", k.size(1));
}

void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_activation(op, "q", q);
  check_activation(op, "k", k, Fp8::kAllowed);
  check_activation(op, "v", v, Fp8::kAllowed);
  check_like_q(op, "k", k, q, Fp8::kAllowed);
  check_batch(op, "k", k, q);
  check_like_q(op, "v", v, q, Fp8::kAllowed);
  check_v_dtype(op, k, v);
  check_batch(op, "v", v, q);
  PRISM_CHECK(v.size(1) == k.size(1) && v.size(2) == k.size(2), op, "v has shape ", shape_string(v),
              "; expected k's, ", shape_string(k));
  check_gqa(op, "q", q.size(1), "k", k.size(1));
}

void check_block_size(const char* op, const char* name, int64_t block_size) {
  PRISM_CHECK(block_size == 64 || block_size == 128, op, name, " is ", block_size,
              "; allowed: 64, 128");
}

void check_block_sizes(const char* op, int64_t q_block_size, int64_t k_block_size) {
  PRISM_CHECK(block_sizes_supported(q_block_size, k_block_size), op,
              "(q_block_size, k_block_size) is (", q_block_size, ", ", k_block_size,
              "); allowed: (128, 128), (128, 64), (64, 64)");
}

Band check_band(const char* op, const char* name, const std::vector<int64_t>& ranges,
                int64_t head_dim) {
  const std::string shown = list_string(ranges.data(), ranges.size());
  PRISM_CHECK(ranges.size() % 2 == 0 && ranges.size() <= 2 * kMaxBandRanges, op, name, " is ",
              shown, "; expected at most ", kMaxBandRanges, " pairs of dimensions [start, end)");
  Band band;
  int64_t previous_end = 0;
  for (size_t i = 0; i < ranges.size(); i += 2) {
    const int64_t start = ranges[i];
    const int64_t end = ranges[i + 1];
    PRISM_CHECK(previous_end <= start && start < end && end <= head_dim, op, name, " is ", shown,
                "; expected sorted, disjoint, non-empty ranges within [0, ", head_dim, ")");
    for (int64_t dim = start; dim < end; ++dim) {
      band.dims[dim / 64] |= uint64_t{1} << (dim % 64);
    }
    band.size += static_cast<int>(end - start);
    previous_end = end;
  }
  return band;
}

void check_rules(const char* op, double top_p, int64_t keep_sink, int64_t keep_recent,
                 std::optional<double> keep_above) {
  PRISM_CHECK(top_p >= 0.0 && top_p <= 1.0, op, "top_p is ", top_p, "; allowed: 0 to 1 inclusive");
  PRISM_CHECK(keep_sink >= 0, op, "keep_sink is ", keep_sink, "; allowed: 0 or more blocks");
  PRISM_CHECK(keep_recent >= 0, op, "keep_recent is ", keep_recent, "; allowed: 0 or more blocks");
  PRISM_CHECK(!keep_above || (*keep_above > 0.0 && *keep_above <= 1.0), op, "keep_above is ",
              *keep_above, "; allowed: None, or above 0 and up to 1");
}

SelectionBands check_selection(const char* op, const std::vector<int64_t>& high_band,
                               const std::vector<int64_t>& low_band, int64_t head_dim, double top_p,
                               int64_t keep_sink, int64_t keep_recent,
                               std::optional<double> keep_above) {
  const SelectionBands bands{check_band(op, "high_band", high_band, head_dim),
                             check_band(op, "low_band", low_band, head_dim)};
  PRISM_CHECK(bands.high.size + bands.low.size > 0, op,
              "high_band and low_band are both empty; at least one must name dimensions");
  check_rules(op, top_p, keep_sink, keep_recent, keep_above);
  return bands;
}

double check_scale(const char* op, std::optional<double> scale, int64_t head_dim) {
  const double value = scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  constexpr double kLog2E = 1.4426950408889634;  // the kernels multiply by it in float32
  PRISM_CHECK(value > 0.0 && std::isnormal(static_cast<float>(value * kLog2E)), op, "scale is ",
              value, "; allowed: finite and above 0, and neither under nor over float32's range");
  return value;
}

void check_sinks(const char* op, const std::optional<Tensor>& sinks, const Tensor& q,
                 int64_t q_heads) {
  if (!sinks) {
    return;
  }
  check_same_device(op, "sinks", *sinks, "q", q);
  PRISM_CHECK(sinks->scalar_type() == ScalarType::Float, op, "sinks has dtype ",
              torch::headeronly::toString(sinks->scalar_type()), "; expected Float (float32)");
  check_shape(op, "sinks", *sinks, {q_heads}, "(q_heads)");
  PRISM_CHECK(sinks->is_contiguous(), op, "sinks is not contiguous; expected contiguous");
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
  PRISM_CHECK(scale->scalar_type() == ScalarType::Float, op, name, " has dtype ",
              torch::headeronly::toString(scale->scalar_type()), "; expected Float (float32)");
  check_shape(op, name, *scale, {heads}, "a scale for each head");
  PRISM_CHECK(scale->is_contiguous(), op, name, " is not contiguous; expected contiguous");
}

void check_kv_scales(const char* op, const Tensor& k, const Tensor& v, int64_t kv_heads,
                     const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  check_head_scale(op, "k_scale", k_scale, "k", k, kv_heads);
  check_head_scale(op, "v_scale", v_scale, "v", v, kv_heads);
}

ScoreOptions check_scores(const char* op, std::optional<double> softcap,
                          std::optional<int64_t> window_left, int64_t k_len) {
  // Within these no step of the kernels leaves float32's normal range.
  constexpr double kLeastCap = 0x1p-64;
  constexpr double kLargestCap = 0x1p64;
  PRISM_CHECK(!softcap || (*softcap >= kLeastCap && *softcap <= kLargestCap), op, "softcap is ",
              *softcap, "; allowed: None, or 2^-64 to 2^64");
  PRISM_CHECK(!window_left || *window_left >= 0, op, "window_left is ", *window_left,
              "; allowed: None, or 0 and more keys");
  const bool reaches_all = !window_left || *window_left >= k_len;
  return {static_cast<float>(softcap.value_or(0.0)),
          reaches_all ? -1 : static_cast<int>(*window_left)};
}

void check_shape(const char* op, const char* name, const Tensor& tensor,
                 const std::vector<int64_t>& shape, const char* meaning) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  PRISM_CHECK(same, op, name, " has shape ", shape_string(tensor), "; expected ",
              list_string(shape.data(), shape.size()), ": ", meaning);
}

void check_int32(const char* op, const char* name, const Tensor& tensor) {
  PRISM_CHECK(tensor.scalar_type() == ScalarType::Int, op, name, " has dtype ",
              torch::headeronly::toString(tensor.scalar_type()), "; expected Int (int32)");
}

void check_int_tensor(const char* op, const char* name, const Tensor& tensor,
                      const std::vector<int64_t>& shape, const char* meaning) {
  check_int32(op, name, tensor);
  check_shape(op, name, tensor, shape, meaning);
  PRISM_CHECK(tensor.is_contiguous(), op, name, " is not contiguous; expected contiguous");
}

}  // namespace prism
