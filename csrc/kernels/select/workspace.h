// What pooling leaves for selection in one allocation: partial band energies, and the key means in
// the order in which tensor cores read them; and where selection keeps the scores of long rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/params.h"

namespace prism {

enum BandEnergy { kHighEnergy, kLowEnergy, kTotalEnergy, kBandEnergies };

// A head's blocks are summed in at most this many chunks, one CTA each.
constexpr int kMaxEnergyChunks = 128;
constexpr int kKeyTile = 8;        // key blocks of one mma tile
constexpr int kDimSlice = 16;      // dimensions of one mma step
constexpr int kKeyPadding = 32;    // key blocks of one mask word
constexpr int kHalfExponent = 13;  // rows are scaled so that their largest element is near 2^13

struct EnergyChunks {
  int64_t size;  // blocks of one chunk
  int count;

  __host__ __device__ explicit EnergyChunks(int64_t blocks)
      : size((blocks + kMaxEnergyChunks - 1) / kMaxEnergyChunks),
        count(size == 0 ? 0 : static_cast<int>((blocks + size - 1) / size)) {}
};

struct SelectWorkspace {
  // The next tile of long rows that a CTA draws; pooling sets it to 0.
  int* tile_counter;
  // (batch, q_heads + kv_heads, 3, kMaxEnergyChunks): sums of squares of the means. Chunks up to
  // the next multiple of 4 are zero, what follows is not written.
  float* energies;
  // (batch, kv_heads, padded_keys): what the tile of a key block has to be multiplied by.
  float* key_scales;
  // (batch, kv_heads, padded_keys / 8, estimation_width / 16, 32): lane 4 j + t of a tile's slice
  // holds dimensions 4 t to 4 t + 3 of key block j, scaled by a power of two and split into the
  // float16 nearest and the float16 of the rest: {high 01, high 23, low 01, low 23}.
  uint4* key_tiles;
  int64_t padded_keys;
  int64_t all_keys;  // (batch, kv_heads, padded_keys)

  __host__ __device__ explicit SelectWorkspace(const SelectBlocksParams& params)
      : padded_keys((params.k_blocks + kKeyPadding - 1) / kKeyPadding * kKeyPadding),
        all_keys(params.batch * params.kv_heads * padded_keys) {
    const int64_t heads = params.batch * (params.q_heads + params.kv_heads);
    constexpr int kLine = 128;  // what follows starts on lines of this many bytes
    tile_counter = static_cast<int*>(params.workspace);
    energies = static_cast<float*>(params.workspace) + kLine / sizeof(float);
    key_scales = energies + heads * kBandEnergies * kMaxEnergyChunks;
    key_tiles = reinterpret_cast<uint4*>(key_scales + all_keys);
  }

  static int64_t bytes(const SelectBlocksParams& params, int64_t strip_rows) {
    SelectBlocksParams at_zero = params;
    at_zero.workspace = nullptr;
    const SelectWorkspace layout(at_zero);
    return reinterpret_cast<intptr_t>(layout.strips(estimation_width(params.head_dim))) +
           strip_rows * layout.padded_keys * int64_t{sizeof(float)};
  }

  // (CTAs of long rows, rows of a tile, padded_keys); none where rows are short. Kernels know their
  // width, estimation_width(head_dim), and have no registers to compute it.
  __host__ __device__ float* strips(int64_t width) const {
    return key_scales + all_keys * (1 + width);
  }

  __host__ __device__ float* head_energies(int64_t head) const {
    return energies + head * kBandEnergies * kMaxEnergyChunks;
  }
};

}  // namespace prism
