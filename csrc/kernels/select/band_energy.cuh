// Sums of squares of the block means over each frequency band: what the calibrated temperatures
// are made of.
#pragma once

#include "kernels/params.h"

namespace prism {

enum BandEnergy { kHighEnergy, kLowEnergy, kTotalEnergy, kBandEnergies };

__device__ inline bool in_band(const Band& band, int dim) {
  return band.dims[dim / 64] >> (dim % 64) & 1;
}

// One CTA a head: the first q_heads CTAs of a batch element take q_means, the others k_means.
// Accumulates in float64, in a fixed order: a thread owns one dimension of every kRowGroups-th row.
template <int kHeadDim, int kThreads>
__global__ void __launch_bounds__(kThreads)
    band_energy_kernel(const __grid_constant__ SelectBlocksParams params) {
  constexpr int kRowGroups = kThreads / kHeadDim;
  __shared__ double partial[kRowGroups][kHeadDim];

  const int heads = params.q_heads + params.kv_heads;
  const int64_t batch = blockIdx.x / heads;
  const int head = static_cast<int>(blockIdx.x % heads);
  const bool is_query = head < params.q_heads;
  const TensorView& means = is_query ? params.q_means : params.k_means;
  const int64_t blocks = is_query ? params.q_blocks : params.k_blocks;
  const int64_t head_index = is_query ? head : head - params.q_heads;
  const int dim = threadIdx.x % kHeadDim;
  const int group = threadIdx.x / kHeadDim;
  const float* source = static_cast<const float*>(means.data) + batch * means.batch_stride +
                        head_index * means.head_stride + dim;

  double sum = 0.0;
#pragma unroll 4
  for (int64_t block = group; block < blocks; block += kRowGroups) {
    const double x = source[block * means.row_stride];
    sum += x * x;
  }
  partial[group][dim] = sum;
  __syncthreads();
  if (threadIdx.x < kBandEnergies) {
    double energy = 0.0;
    for (int d = 0; d < kHeadDim; ++d) {
      const bool counted = threadIdx.x == kTotalEnergy ||
                           in_band(threadIdx.x == kHighEnergy ? params.high : params.low, d);
      if (counted) {
        for (int i = 0; i < kRowGroups; ++i) {
          energy += partial[i][d];
        }
      }
    }
    params.energies[static_cast<int64_t>(blockIdx.x) * kBandEnergies + threadIdx.x] =
        static_cast<float>(energy);
  }
}

// max(x, 1e-6), but NaN stays NaN: fmaxf would drop it, and with it the mark of an undefined row.
__device__ inline float at_least_epsilon(float x) { return x < 1e-6f ? 1e-6f : x; }

// RMS(X_z) / max(RMS(X), 1e-6) of one head.
__device__ inline float relative_rms(float band_energy, float total_energy, float blocks,
                                     int band_size, int head_dim) {
  const float band_rms = sqrtf(band_energy / (blocks * static_cast<float>(band_size)));
  const float total_rms = sqrtf(total_energy / (blocks * static_cast<float>(head_dim)));
  return band_rms / at_least_epsilon(total_rms);
}

}  // namespace prism
