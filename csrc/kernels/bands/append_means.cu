#include "kernels/bands/append_means.h"

#include <cstdint>
#include <string>
#include <type_traits>

#include "kernels/common/launch.h"
#include "kernels/common/load_rows.cuh"
#include "kernels/describe.h"

namespace prism {

namespace {

constexpr int kThreads = 128;  // as many as pooling has, which adds in the same order

struct TokenRange {
  int64_t first_block;
  int64_t last_block;

  __host__ __device__ explicit TokenRange(const AppendMeansParams& params)
      : first_block(params.start / params.block_size),
        last_block((params.start + params.length - 1) / params.block_size) {}

  // One CTA takes the first and the last block: it reads the sums of the one before it writes those
  // of the other.
  __host__ __device__ int64_t head_ctas() const {
    return last_block > first_block ? last_block - first_block : 1;
  }
};

// kWidth / 8 threads span a row; group g of them adds up the tokens g, g + kRowGroups, ... of a
// block. Those sums, kept of an unfinished block, go on as if there had been no cut.
template <typename Element, int kWidth, Rows kRows>
class BlockAppender {
 public:
  static constexpr int kRowThreads = kWidth / kVector;
  static constexpr int kRowGroups = kThreads / kRowThreads;
  using Sums = float[kRowGroups][kWidth];
  static_assert(kRowGroups == running_sums(kWidth));

  __device__ BlockAppender(const AppendMeansParams& params, int64_t head, Sums& sums)
      : params_(params),
        head_(head % params.heads),
        head_dim_(kRows == Rows::kWhole ? kWidth : params.head_dim),
        source_(static_cast<const Element*>(params.x.data) +
                head / params.heads * params.x.batch_stride +
                head % params.heads * params.x.head_stride + lane() * kVector),
        means_(params.means + head * params.capacity * head_dim_),
        running_(params.sums + head * kRowGroups * head_dim_),
        shared_(sums) {}

  __device__ void append(int64_t block) const {
    const int64_t begin = block * params_.block_size;
    const int64_t end = params_.start + params_.length;
    const int old_rows = static_cast<int>(max(params_.start - begin, int64_t{0}));
    const int rows = static_cast<int>(min(end - begin, int64_t{params_.block_size}));
    const bool has_dims = kRows == Rows::kWhole || lane() * kVector < head_dim_;
    float sum[kVector] = {};
    float* const mine = running_ + group() * head_dim_ + lane() * kVector;
    if (old_rows > 0 && has_dims) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] = mine[i];
      }
    }
    const int skipped = max(old_rows - group() + kRowGroups - 1, 0) / kRowGroups;
    const Element* const block_source = source_ + (begin - params_.start) * params_.x.row_stride;
    const int end_row = has_dims ? rows : 0;
#pragma unroll 8
    for (int row = group() + skipped * kRowGroups; row < end_row; row += kRowGroups) {
      const Pack<Element> pack = load<Element, kRows>(block_source + row * params_.x.row_stride);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] += to_float(pack.element[i]);
      }
    }
    __syncthreads();  // the sums of the block before are done with
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      shared_[group()][lane() * kVector + i] = sum[i];
    }
    if (rows < params_.block_size && has_dims) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        mine[i] = sum[i];
      }
    }
    __syncthreads();
    for (int dim = threadIdx.x; dim < head_dim_; dim += kThreads) {
      float total = 0.f;
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) {
        total += shared_[g][dim];
      }
      const float mean = total / static_cast<float>(rows);
      if constexpr (std::is_same_v<Element, Fp8Code>) {
        means_[block * head_dim_ + dim] = mean * mean_scale(params_.scale, head_);
      } else {
        means_[block * head_dim_ + dim] = mean;
      }
    }
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kRowThreads; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) / kRowThreads; }

  const AppendMeansParams& params_;
  const int64_t head_;
  const int head_dim_;
  const Element* source_;
  float* means_;
  float* running_;
  Sums& shared_;
};

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kThreads)
    append_means_kernel(const __grid_constant__ AppendMeansParams params) {
  using Appender = BlockAppender<Element, Shape::kWidth, Shape::kRows>;
  __shared__ typename Appender::Sums sums;
  const TokenRange range(params);
  const int64_t ctas = range.head_ctas();
  const Appender appender(params, blockIdx.x / ctas, sums);
  const int64_t index = blockIdx.x % ctas;
  appender.append(range.first_block + index);
  if (index == 0 && range.last_block > range.first_block) {
    appender.append(range.last_block);
  }
}

}  // namespace

cudaError_t launch_append_means(const AppendMeansParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.heads == 0 || params.length == 0) {
    return cudaSuccess;
  }
  const int64_t grid = params.batch * params.heads * TokenRange(params).head_ctas();
  const bool aligned = is_aligned(params.x);
  return launch_dtype<Elements>(params.dtype, [&](auto element) {
    return RowsOfAnyWidth::launch_first(
        [&](auto rows) { return rows.fits(params.head_dim, aligned); },
        [&](auto rows) {
          return launch_kernel(append_means_kernel<decltype(element), decltype(rows)>,
                               {grid, kThreads, 0}, stream, params);
        });
  });
}

void describe_append_means(std::vector<KernelInfo>& kernels) {
  Elements::for_each([&](auto element) {
    RowsOfAnyWidth::for_each([&](auto rows) {
      using Element = decltype(element);
      describe_kernel(
          kernels,
          std::string("append_means<") + ElementTraits<Element>::kName + ", " + rows.name() + ">",
          "one block of tokens", append_means_kernel<Element, decltype(rows)>, kThreads, 0);
    });
  });
}

}  // namespace prism
