// What becomes of one block mean held by a warp: key tiles and band energies. Pooling and
// preparing share it, so both ways into selection give the same bits.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/bands/workspace.h"
#include "kernels/common/half_scale.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/params.h"

namespace prism {

constexpr int kEmitWarps = 4;  // warps of a CTA that take a chunk's blocks in turn

// {high 01, high 23, low 01, low 23}: x = high + low to 22 bits, for |x| within float16's range.
__device__ inline uint4 split_halves(float4 x) {
  const __half2 high[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
  const float2 a = __half22float2(high[0]);
  const float2 b = __half22float2(high[1]);
  const __half2 low[2] = {__floats2half2_rn(x.x - a.x, x.y - a.y),
                          __floats2half2_rn(x.z - b.x, x.w - b.y)};
  return {*reinterpret_cast<const uint32_t*>(&high[0]),
          *reinterpret_cast<const uint32_t*>(&high[1]), *reinterpret_cast<const uint32_t*>(&low[0]),
          *reinterpret_cast<const uint32_t*>(&low[1])};
}

// NaN and inf decide through the temperatures; in a tile they would also spoil the other band.
__device__ inline float finite_or_zero(float x) { return isfinite(x) ? x : 0.f; }

__device__ inline float4 finite_or_zero(float4 x) {
  return {finite_or_zero(x.x), finite_or_zero(x.y), finite_or_zero(x.z), finite_or_zero(x.w)};
}

__device__ inline float largest_magnitude(float4 x) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

// Bits of dimensions dim to dim + 3.
__device__ inline uint32_t band_nibble(const Band& band, int dim) {
  return static_cast<uint32_t>(band.dims[dim / 64] >> (dim % 64)) & 15u;
}

// A mean of kWidth dimensions over a warp: element i of a lane's holds four dimensions from
// first_dim(i, lane) on, 0 where there are none.
template <int kWidth>
using LaneMean = float4[kWidth <= 128 ? 1 : kWidth / 128];

__device__ inline int first_dim(int i, int lane) { return (i * 32 + lane) * 4; }

// Writes key block `block` of kv head `head` (over the batch). The block after the last pads with
// zeros.
template <int kWidth>
__device__ void write_key_tile(const BandsWorkspace& workspace, int64_t head, int64_t block,
                               const LaneMean<kWidth>& mean, int lane) {
  constexpr int kSlices = kWidth / kDimSlice;
  constexpr int kQuads = sizeof(mean) / sizeof(float4);
  float4 finite[kQuads];
  float lane_largest = 0.f;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    finite[i] = finite_or_zero(mean[i]);
    lane_largest = fmaxf(lane_largest, largest_magnitude(finite[i]));
  }
  const uint32_t largest = __reduce_max_sync(kAllLanes, __float_as_uint(lane_largest));
  const HalfScale factor(__uint_as_float(largest));
  const int64_t tile = (head * workspace.padded_keys + block) / kKeyTile;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int quad = first_dim(i, lane) / 4;
    if (quad < kWidth / 4) {
      const float4 x = finite[i];
      workspace.key_tiles[(tile * kSlices + quad / 4) * 32 + (block % kKeyTile) * 4 + quad % 4] =
          split_halves(
              {x.x * factor.scale, x.y * factor.scale, x.z * factor.scale, x.w * factor.scale});
    }
  }
  if (lane == 0) {
    workspace.key_scales[head * workspace.padded_keys + block] = factor.inverse;
  }
}

// Fills the last mask word of a head that has `blocks` key blocks.
template <int kWidth>
__device__ void pad_key_tiles(const BandsWorkspace& workspace, int64_t head, int64_t blocks,
                              int lane) {
  const LaneMean<kWidth> zero = {};
  for (int64_t block = blocks; block % kKeyPadding != 0; ++block) {
    write_key_tile<kWidth>(workspace, head, block, zero, lane);
  }
}

// Sums of squares over a chunk: each lane its dimensions, each warp its blocks.
struct EnergySums {
  double sums[kBandEnergies] = {};

  __device__ void add(float4 mean, uint32_t high, uint32_t low) {
    const float values[4] = {mean.x, mean.y, mean.z, mean.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double square = static_cast<double>(values[i]) * values[i];
      sums[kHighEnergy] += high >> i & 1 ? square : 0.0;
      sums[kLowEnergy] += low >> i & 1 ? square : 0.0;
      sums[kTotalEnergy] += square;
    }
  }

  // Combines the CTA's kEmitWarps warps in a fixed order. Every thread has to call it.
  __device__ void store(float* head_energies, int chunk, int chunks) {
    __shared__ double partial[kEmitWarps][kBandEnergies];
#pragma unroll
    for (int z = 0; z < kBandEnergies; ++z) {
      sums[z] = lanes_sum(sums[z]);
      if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32][z] = sums[z];
      }
    }
    __syncthreads();
    if (threadIdx.x < kBandEnergies) {
      double sum = 0.0;
#pragma unroll
      for (int warp = 0; warp < kEmitWarps; ++warp) {
        sum += partial[warp][threadIdx.x];
      }
      float* energies = head_energies + threadIdx.x * kMaxEnergyChunks;
      energies[chunk] = static_cast<float>(sum);
      if (chunk + 1 == chunks) {  // readers take four at a time
        for (int i = chunks; i % 4 != 0; ++i) {
          energies[i] = 0.f;
        }
      }
    }
  }
};

}  // namespace prism
