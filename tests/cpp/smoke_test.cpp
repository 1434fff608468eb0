// The kernels through their C++ interface, without torch, against references in double.
// Exit status: 0 all right, 1 wrong results or a CUDA error, 77 no CUDA device.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/attention/sparse_attention.h"
#include "kernels/bands/block_pool.h"
#include "kernels/bands/select_bands.h"
#include "kernels/grid/select_grid.h"
#include "kernels/introspect.h"
#include "kernels/keep/keep_blocks.h"

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t size) : size_(size) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data_, 0xff, size * sizeof(T)), "cudaMemset");  // NaN where nothing writes
  }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) {
    check(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "copy in");
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* get() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> result(size_);
    check(cudaMemcpy(result.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy out");
    return result;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

struct Shape {
  int q_heads, kv_heads, q_len, k_len, head_dim, q_block, k_block;

  int q_blocks() const { return (q_len + q_block - 1) / q_block; }
  int k_blocks() const { return (k_len + k_block - 1) / k_block; }
  int words() const { return (k_blocks() + 31) / 32; }
};

// A contiguous (1, heads, length, head_dim) tensor of normal values, on both sides.
struct Input {
  int heads, length, head_dim;
  std::vector<double> values;  // as rounded to bfloat16
  DeviceBuffer<__nv_bfloat16> device;

  Input(int heads, int length, int head_dim, std::mt19937& random)
      : Input(heads, length, head_dim, normal(size_t(heads) * length * head_dim, random)) {}

  prism::TensorView view() const {
    return {device.get(), int64_t(heads) * length * head_dim, int64_t(length) * head_dim, head_dim};
  }
  const double* row(int head, int token) const {
    return &values[(size_t(head) * length + token) * head_dim];
  }

 private:
  Input(int heads, int length, int head_dim, const std::vector<__nv_bfloat16>& host)
      : heads(heads), length(length), head_dim(head_dim), device(host) {
    for (__nv_bfloat16 value : host) {
      values.push_back(__bfloat162float(value));
    }
  }
  static std::vector<__nv_bfloat16> normal(size_t size, std::mt19937& random) {
    std::normal_distribution<float> distribution;
    std::vector<__nv_bfloat16> host;
    for (size_t i = 0; i < size; ++i) {
      host.push_back(__float2bfloat16(distribution(random)));
    }
    return host;
  }
};

int failures = 0;

void report(const char* what, const Shape& shape, double error, double allowed) {
  const bool ok = error <= allowed;  // false for NaN
  std::printf("%-16s q %dx%d, k %dx%d, head_dim %d, blocks (%d, %d): error %.2e, %s\n", what,
              shape.q_heads, shape.q_len, shape.kv_heads, shape.k_len, shape.head_dim,
              shape.q_block, shape.k_block, error, ok ? "ok" : "FAILED");
  failures += !ok;
}

// std::max drops a NaN; here it has to stay.
double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

DeviceBuffer<float> test_block_pool(const Shape& shape, const Input& x, int block_size) {
  const int blocks = (x.length + block_size - 1) / block_size;
  DeviceBuffer<float> means(size_t(x.heads) * blocks * x.head_dim);
  prism::BlockPoolParams params = {};
  params.x = x.view();
  params.means = means.get();
  params.batch = 1;
  params.heads = x.heads;
  params.length = x.length;
  params.head_dim = x.head_dim;
  params.block_size = block_size;
  params.dtype = prism::DType::kBFloat16;
  check(prism::launch_block_pool(params, nullptr), "block_pool");

  const std::vector<float> result = means.host();
  double error = 0;
  for (int head = 0; head < x.heads; ++head) {
    for (int block = 0; block < blocks; ++block) {
      const int begin = block * block_size;
      const int end = std::min(begin + block_size, x.length);
      for (int d = 0; d < x.head_dim; ++d) {
        double sum = 0;
        for (int token = begin; token < end; ++token) {
          sum += x.row(head, token)[d];
        }
        const double got = result[(size_t(head) * blocks + block) * x.head_dim + d];
        error = larger(std::abs(got - sum / (end - begin)), error);
      }
    }
  }
  report("block_pool", shape, error, 1e-5);
  return DeviceBuffer<float>(result);
}

struct Mask {
  std::vector<uint32_t> bits;
  std::vector<int32_t> counts;
};

bool selected(const Shape& shape, const Mask& mask, int head, int q_block, int k_block) {
  const size_t row = size_t(head) * shape.q_blocks() + q_block;
  return mask.bits[row * shape.words() + k_block / 32] >> (k_block % 32) & 1;
}

int compute_capability() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "attribute");
  return 10 * major + minor;
}

prism::KeepRules rules_of(double top_p, double keep_above = INFINITY) {
  prism::KeepRules rules;
  rules.top_p[0] = top_p;
  rules.keep_above[0] = keep_above;
  return rules;
}

prism::SelectParams select_params(const Shape& shape, const prism::KeepRules& rules) {
  prism::SelectParams params = {};
  params.batch = 1;
  params.q_heads = shape.q_heads;
  params.kv_heads = shape.kv_heads;
  params.q_len = shape.q_len;
  params.k_len = shape.k_len;
  params.q_blocks = shape.q_blocks();
  params.k_blocks = shape.k_blocks();
  params.head_dim = shape.head_dim;
  params.q_block_size = shape.q_block;
  params.k_block_size = shape.k_block;
  params.rules = rules;
  params.causal = true;
  return params;
}

// Allocates the outputs, and a workspace of as many bytes, for a launch that fills them.
template <typename Launch>
Mask run_selection(const Shape& shape, int64_t workspace_bytes, prism::SelectParams& params,
                   const char* what, Launch launch) {
  const size_t rows = size_t(shape.q_heads) * shape.q_blocks();
  const DeviceBuffer<char> workspace(workspace_bytes);
  const DeviceBuffer<uint32_t> bits(rows * shape.words());
  const DeviceBuffer<int32_t> counts(rows);
  params.workspace = workspace.get();
  params.bits = bits.get();
  params.counts = counts.get();
  check(launch(), what);
  return {bits.host(), counts.host()};
}

// From k_means if there are any, else from k. Launches do not overlap where `sm` is below 90.
Mask select_bands(const Shape& shape, const Input& q, const Input& k,
                  const DeviceBuffer<float>* k_means, const prism::KeepRules& rules, int sm) {
  prism::BandsParams params = {};
  params.q = q.view();
  if (k_means == nullptr) {
    params.k = k.view();
  } else {
    const int64_t head_stride = int64_t(shape.k_blocks()) * shape.head_dim;
    params.k_means = {k_means->get(), shape.kv_heads * head_stride, head_stride, shape.head_dim};
  }
  params.select = select_params(shape, rules);
  params.high.dims[0] = 0xffffffff;  // dimensions 0 to 31
  params.high.size = 32;
  params.low.dims[0] = 0xffffffff00000000;  // dimensions 32 to 63
  params.low.size = 32;
  params.dtype = prism::DType::kBFloat16;
  int64_t bytes = 0;
  check(prism::bands_workspace_bytes(params, &bytes), "bands_workspace_bytes");
  return run_selection(shape, bytes, params.select, "select_bands",
                       [&] { return prism::launch_select_bands(params, sm, nullptr); });
}

Mask select_grid(const Shape& shape, const Input& q, const Input& k,
                 const prism::KeepRules& rules) {
  prism::GridParams params = {};
  params.q = q.view();
  params.k = k.view();
  params.scale = static_cast<float>(1 / std::sqrt(double(shape.head_dim)));
  params.dtype = prism::DType::kBFloat16;
  params.select = select_params(shape, rules);
  int64_t bytes = 0;
  check(prism::grid_workspace_bytes(params, &bytes), "grid_workspace_bytes");
  return run_selection(shape, bytes, params.select, "select_grid", [&] {
    return prism::launch_select_grid(params, compute_capability(), nullptr);
  });
}

// Words in which two masks differ, of heads [first, end).
int differing(const Shape& shape, const Mask& a, const Mask& b, int first, int end) {
  const size_t head_words = size_t(shape.q_blocks()) * shape.words();
  int count = 0;
  for (size_t i = first * head_words; i < end * head_words; ++i) {
    count += a.bits[i] != b.bits[i];
  }
  for (size_t row = size_t(first) * shape.q_blocks(); row < size_t(end) * shape.q_blocks(); ++row) {
    count += a.counts[row] != b.counts[row];
  }
  return count;
}

// With rules of its own every head keeps what it keeps where all heads have these rules.
template <typename Select>
void test_rules_per_head(const char* what, const Shape& shape, Select select) {
  prism::KeepRules rules;
  rules.per_head = true;
  for (int head = 0; head < shape.q_heads; ++head) {
    rules.top_p[head] = head % 3 == 0 ? 1.0 : 0.9 / head;
    rules.keep_above[head] = head % 2 == 0 ? INFINITY : 0.05;
  }
  const Mask mask = select(rules);
  int wrong = 0;
  for (int head = 0; head < shape.q_heads; ++head) {
    const Mask alone = select(rules_of(rules.top_p[head], rules.keep_above[head]));
    wrong += differing(shape, mask, alone, head, head + 1);
  }
  report(what, shape, wrong, 0);
}

// What a window of that many keys shows, counted by hand: keep_blocks writes no more and no less.
Mask visible_blocks(const Shape& shape, int window_left) {
  Mask mask;
  const int offset = shape.k_len - shape.q_len;
  for (int head = 0; head < shape.q_heads; ++head) {
    for (int i = 0; i < shape.q_blocks(); ++i) {
      std::vector<uint32_t> row(shape.words());
      int count = 0;
      for (int j = 0; j < shape.k_blocks(); ++j) {
        bool seen = false;
        for (int token = i * shape.q_block; token < std::min((i + 1) * shape.q_block, shape.q_len);
             ++token) {
          const int last = token + offset;
          const int first = window_left < 0 ? 0 : last - window_left;
          seen |= j * shape.k_block <= last && (j + 1) * shape.k_block > first;
        }
        row[j / 32] |= uint32_t{seen} << (j % 32);
        count += seen;
      }
      mask.bits.insert(mask.bits.end(), row.begin(), row.end());
      mask.counts.push_back(count);
    }
  }
  return mask;
}

void test_keep_blocks(const Shape& shape) {
  for (int window_left : {-1, 0, 70}) {
    prism::KeepBlocksParams params = {};
    params.select = select_params(shape, rules_of(1));
    params.window_left = window_left;
    const Mask mask = run_selection(shape, 1, params.select, "keep_blocks",
                                    [&] { return prism::launch_keep_blocks(params, nullptr); });
    report("keep_blocks", shape,
           differing(shape, mask, visible_blocks(shape, window_left), 0, shape.q_heads), 0);
  }
}

// top_p = 1 keeps what is visible, no more and no less; below, all ways give the same mask.
void test_select_bands(const Shape& shape, const Input& q, const Input& k,
                       const DeviceBuffer<float>& k_means) {
  const int sm = compute_capability();
  const Mask all = select_bands(shape, q, k, &k_means, rules_of(1), sm);
  report("select_bands", shape, differing(shape, all, visible_blocks(shape, -1), 0, shape.q_heads),
         0);
  const Mask some = select_bands(shape, q, k, &k_means, rules_of(0.5), sm);
  const Mask portable = select_bands(shape, q, k, &k_means, rules_of(0.5), 80);
  const Mask pooled = select_bands(shape, q, k, nullptr, rules_of(0.5), sm);
  report("without overlap", shape, differing(shape, some, portable, 0, shape.q_heads), 0);
  report("from k", shape, differing(shape, some, pooled, 0, shape.q_heads), 0);
  test_rules_per_head("bands per head", shape, [&](const prism::KeepRules& rules) {
    return select_bands(shape, q, k, nullptr, rules, sm);
  });
}

// Half of the blocks at random; the first query block of head 0 has none.
Mask random_mask(const Shape& shape, std::mt19937& random) {
  Mask mask;
  for (int head = 0; head < shape.q_heads; ++head) {
    for (int i = 0; i < shape.q_blocks(); ++i) {
      std::vector<uint32_t> row(shape.words());
      int count = 0;
      for (int j = 0; j < shape.k_blocks(); ++j) {
        if (random() % 2 == 1 && (head != 0 || i != 0)) {
          row[j / 32] |= 1u << (j % 32);
          ++count;
        }
      }
      mask.bits.insert(mask.bits.end(), row.begin(), row.end());
      mask.counts.push_back(count);
    }
  }
  return mask;
}

void test_sparse_attention(const Shape& shape, const Input& q, const Input& k, const Input& v,
                           std::mt19937& random) {
  const Mask mask = random_mask(shape, random);
  const DeviceBuffer<uint32_t> bits(mask.bits);
  const DeviceBuffer<int32_t> counts(mask.counts);
  DeviceBuffer<__nv_bfloat16> out(q.values.size());
  DeviceBuffer<float> lse(size_t(shape.q_heads) * shape.q_len);
  DeviceBuffer<int32_t> tile_counter(1);
  const double scale = 1 / std::sqrt(double(shape.head_dim));

  prism::SparseAttentionParams params = {};
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  params.out = q.view();
  params.out.data = out.get();
  params.lse = lse.get();
  params.bits = bits.get();
  params.counts = counts.get();
  params.tile_counter = tile_counter.get();
  params.batch = 1;
  params.q_heads = shape.q_heads;
  params.kv_heads = shape.kv_heads;
  params.q_len = shape.q_len;
  params.k_len = shape.k_len;
  params.head_dim = shape.head_dim;
  params.q_block_size = shape.q_block;
  params.k_block_size = shape.k_block;
  params.scale = static_cast<float>(scale);
  params.causal = true;
  params.dtype = prism::DType::kBFloat16;
  check(prism::launch_sparse_attention(params, compute_capability(), nullptr), "sparse_attention");

  const std::vector<__nv_bfloat16> result = out.host();
  const std::vector<float> result_lse = lse.host();
  double error = 0, lse_error = 0;
  for (int head = 0; head < shape.q_heads; ++head) {
    const int kv_head = head / (shape.q_heads / shape.kv_heads);
    for (int i = 0; i < shape.q_len; ++i) {
      std::vector<double> expected(shape.head_dim);
      double sum = 0;  // scores of normal values are small enough for plain exponentials
      for (int j = 0; j <= i + shape.k_len - shape.q_len; ++j) {
        if (!selected(shape, mask, head, i / shape.q_block, j / shape.k_block)) {
          continue;
        }
        double score = 0;
        for (int d = 0; d < shape.head_dim; ++d) {
          score += q.row(head, i)[d] * k.row(kv_head, j)[d];
        }
        const double weight = std::exp(scale * score);
        sum += weight;
        for (int d = 0; d < shape.head_dim; ++d) {
          expected[d] += weight * v.row(kv_head, j)[d];
        }
      }
      const size_t row = size_t(head) * shape.q_len + i;
      for (int d = 0; d < shape.head_dim; ++d) {
        const double got = __bfloat162float(result[row * shape.head_dim + d]);
        error = larger(std::abs(got - (sum > 0 ? expected[d] / sum : 0)), error);
      }
      const double got = result_lse[row];
      const bool both_empty = sum == 0 && got == -std::numeric_limits<double>::infinity();
      lse_error = larger(both_empty ? 0 : std::abs(got - std::log(sum)), lse_error);
    }
  }
  report("attention out", shape, error, 3e-2);  // bfloat16: 2^-8 of values up to about 4
  report("attention lse", shape, lse_error, 1e-3);
}

// Means and standard deviations of a head's cells of 16 tokens: (cells, head_dim).
struct Cells {
  std::vector<std::vector<double>> means, spreads;

  Cells(const Input& x, int head) {
    for (int begin = 0; begin < x.length; begin += 16) {
      const int end = std::min(begin + 16, x.length);
      std::vector<double> mean(x.head_dim), spread(x.head_dim);
      for (int d = 0; d < x.head_dim; ++d) {
        for (int token = begin; token < end; ++token) {
          mean[d] += x.row(head, token)[d] / (end - begin);
        }
        for (int token = begin; token < end; ++token) {
          const double difference = x.row(head, token)[d] - mean[d];
          spread[d] += difference * difference / (end - begin);
        }
        spread[d] = std::sqrt(spread[d]);
      }
      means.push_back(mean);
      spreads.push_back(spread);
    }
  }
};

// Blocks of at least some mass, but for those whose mass is within 1 % of it.
void test_select_grid(const Shape& shape, const Input& q, const Input& k) {
  const double least = 1.5 / shape.k_blocks();
  const double scale = 1 / std::sqrt(double(shape.head_dim));
  const Mask mask = select_grid(shape, q, k, rules_of(0, least));
  int wrong = 0;
  for (int head = 0; head < shape.q_heads; ++head) {
    const Cells q_cells(q, head), k_cells(k, head / (shape.q_heads / shape.kv_heads));
    for (int i = 0; i < shape.q_blocks(); ++i) {
      std::vector<double> masses(shape.k_blocks());
      const int offset = shape.k_len - shape.q_len;
      const int end = std::min((i + 1) * shape.q_block, shape.q_len);
      for (int begin = i * shape.q_block; begin < end; begin += 16) {
        const int last_position = std::min(begin + 16, end) - 1 + offset;
        std::vector<double> weights;
        double total = 0;
        for (int c = 0; 16 * c <= last_position && 16 * c < shape.k_len; ++c) {
          double score = 0;
          for (int d = 0; d < shape.head_dim; ++d) {
            const double mean = scale * q_cells.means[begin / 16][d];
            score += mean * k_cells.means[c][d] + std::abs(mean) * k_cells.spreads[c][d];
          }
          weights.push_back(std::exp(score));
          total += weights.back();
        }
        std::vector<double> shares(shape.k_blocks());
        for (size_t c = 0; c < weights.size(); ++c) {
          shares[16 * c / shape.k_block] += weights[c] / total;
        }
        for (int j = 0; j < shape.k_blocks(); ++j) {
          masses[j] = std::max(masses[j], shares[j]);
        }
      }
      const double sum = std::accumulate(masses.begin(), masses.end(), 0.0);
      const int own_begin = (i * shape.q_block + offset) / shape.k_block;
      const int own_end = (end - 1 + offset) / shape.k_block;
      int count = 0;
      for (int j = 0; j < shape.k_blocks(); ++j) {
        const double mass = masses[j] / sum;
        const bool forced = j == 0 || (j >= own_begin && j <= own_end);
        const bool got = selected(shape, mask, head, i, j);
        count += got;
        wrong += got != (forced || mass >= least) && std::abs(mass - least) > 0.01 * least;
      }
      wrong += mask.counts[size_t(head) * shape.q_blocks() + i] != count;
    }
  }
  report("select_grid", shape, wrong, 0);
  test_rules_per_head("grid per head", shape, [&](const prism::KeepRules& rules) {
    return select_grid(shape, q, k, rules);
  });
}

void test_shape(const Shape& shape) {
  std::mt19937 random(0);
  const Input q(shape.q_heads, shape.q_len, shape.head_dim, random);
  const Input k(shape.kv_heads, shape.k_len, shape.head_dim, random);
  const Input v(shape.kv_heads, shape.k_len, shape.head_dim, random);
  test_block_pool(shape, q, shape.q_block);
  test_select_bands(shape, q, k, test_block_pool(shape, k, shape.k_block));
  if (shape.head_dim <= 128) {
    test_select_grid(shape, q, k);
  }
  test_keep_blocks(shape);
  test_sparse_attention(shape, q, k, v, random);
}

// Selection alone, where the keys of a row do not fit one CTA's registers.
void test_long_rows(const Shape& shape) {
  std::mt19937 random(1);
  const Input q(shape.q_heads, shape.q_len, shape.head_dim, random);
  const Input k(shape.kv_heads, shape.k_len, shape.head_dim, random);
  test_select_bands(shape, q, k, test_block_pool(shape, k, shape.k_block));
}

void test_introspection() {
  const std::vector<prism::KernelInfo> kernels = prism::list_kernels();
  const auto broken = std::count_if(kernels.begin(), kernels.end(),
                                    [](const auto& kernel) { return !kernel.error.empty(); });
  std::printf("list_kernels     %zu kernels, %td with errors\n", kernels.size(), broken);
  failures += kernels.empty() || broken > 0;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  try {
    for (int head_dim : {64, 96, 128, 256}) {
      test_shape({4, 2, 300, 300, head_dim, 128, 128});
      test_shape({4, 1, 200, 333, head_dim, 64, 64});
      test_shape({3, 3, 257, 600, head_dim, 128, 64});
    }
    test_long_rows({4, 2, 500, 100000, 128, 64, 64});  // 1,563 key blocks
    test_introspection();
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
