// The calibrated temperatures, from the partial band energies that pooling left.
#pragma once

#include "kernels/bands/workspace.h"
#include "kernels/common/batch.cuh"
#include "kernels/common/warp.cuh"

namespace prism {

// max(x, 1e-6), but NaN stays NaN: fmaxf would drop it, and with it the mark of an undefined row.
__device__ inline float at_least_epsilon(float x) { return x < 1e-6f ? 1e-6f : x; }

// RMS(X_z) / max(RMS(X), 1e-6) of one head.
__device__ inline float relative_rms(float band_energy, float total_energy, float blocks,
                                     int band_size, int head_dim) {
  const float band_rms = sqrtf(band_energy / (blocks * static_cast<float>(band_size)));
  const float total_rms = sqrtf(total_energy / (blocks * static_cast<float>(head_dim)));
  return band_rms / at_least_epsilon(total_rms);
}

struct HeadEnergies {
  float energies[kBandEnergies];

  // Summed by a half warp, in a fixed order.
  __device__ HeadEnergies(const float* partial, int chunks) {
    const int lane = threadIdx.x % 16;
    double sums[kBandEnergies] = {};
#pragma unroll
    for (int i = 0; i < kMaxEnergyChunks / 64; ++i) {
      const int chunk = (i * 16 + lane) * 4;
      if (chunk < chunks) {
#pragma unroll
        for (int z = 0; z < kBandEnergies; ++z) {
          const float4 x = *reinterpret_cast<const float4*>(partial + z * kMaxEnergyChunks + chunk);
          sums[z] += (static_cast<double>(x.x) + x.y) + (static_cast<double>(x.z) + x.w);
        }
      }
    }
#pragma unroll
    for (int z = 0; z < kBandEnergies; ++z) {
      energies[z] = static_cast<float>(lanes_sum<16>(sums[z]));
    }
  }
};

// 1 / (sqrt(d_z) tau_z) of a pair of heads; NaN where a temperature does not exist.
__device__ inline float logit_scale(const SelectParams& params, const Lengths& lengths,
                                    const HeadEnergies& q, const HeadEnergies& k, BandEnergy band,
                                    int band_size) {
  const float size = static_cast<float>(band_size);
  const float tau = sqrtf(size / static_cast<float>(params.head_dim)) *
                    relative_rms(q.energies[band], q.energies[kTotalEnergy],
                                 static_cast<float>(lengths.q_blocks), band_size, params.head_dim) *
                    relative_rms(k.energies[band], k.energies[kTotalEnergy],
                                 static_cast<float>(lengths.k_blocks), band_size, params.head_dim);
  return 1.f / (sqrtf(size) * at_least_epsilon(tau));
}

}  // namespace prism
