// What pooling leaves for selection in one allocation: query means, partial band energies, and the
// key means in the order in which tensor cores read them; and where selection keeps the scores of
// long rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/carver.h"
#include "kernels/common/type_list.h"
#include "kernels/params.h"

namespace prism {

// The widths that kernels come in, see estimation_width.
using Widths = TypeList<std::integral_constant<int, 64>, std::integral_constant<int, 128>,
                        std::integral_constant<int, kMaxHeadDim>>;

// Calls f with the width for that head_dim.
template <typename F>
cudaError_t launch_width(int head_dim, F f) {
  return Widths::launch_first([&](auto width) { return head_dim <= width; }, f);
}

enum BandEnergy { kHighEnergy, kLowEnergy, kTotalEnergy, kBandEnergies };

// A head's blocks are summed in at most this many chunks, one CTA each.
constexpr int kMaxEnergyChunks = 128;
constexpr int kKeyTile = 8;      // key blocks of one mma tile
constexpr int kDimSlice = 16;    // dimensions of one mma step
constexpr int kKeyPadding = 32;  // key blocks of one mask word

struct EnergyChunks {
  int64_t size;  // blocks of one chunk
  int count;

  __host__ __device__ explicit EnergyChunks(int64_t blocks)
      : size((blocks + kMaxEnergyChunks - 1) / kMaxEnergyChunks),
        count(size == 0 ? 0 : static_cast<int>((blocks + size - 1) / size)) {}
};

struct BandsWorkspace {
  // The next tile of long rows that a CTA draws; pooling sets it to 0.
  int* tile_counter;
  // (batch, q_heads, q_blocks, head_dim)
  float* q_means;
  // (batch, q_heads + kv_heads, 3, kMaxEnergyChunks): sums of squares of the means. Chunks up to
  // the next multiple of 4 are zero, what follows is not written.
  float* energies;
  // (batch, kv_heads, padded_keys): what the tile of a key block has to be multiplied by.
  float* key_scales;
  // (batch, kv_heads, padded_keys / 8, estimation_width / 16, 32): lane 4 j + t of a tile's slice
  // holds dimensions 4 t to 4 t + 3 of key block j, scaled by a power of two and split into the
  // float16 nearest and the float16 of the rest: {high 01, high 23, low 01, low 23}.
  uint4* key_tiles;
  // (CTAs of long rows, rows of a tile, padded_keys); none where rows are short.
  float* strips;
  int64_t padded_keys;
  int64_t bytes;

  BandsWorkspace() = default;
  // strip_rows: of the tiles of all CTAs that select long rows.
  BandsWorkspace(const SelectParams& params, int64_t strip_rows)
      : padded_keys((params.k_blocks + kKeyPadding - 1) / kKeyPadding * kKeyPadding) {
    const int64_t q_heads = params.batch * params.q_heads;
    const int64_t kv_heads = params.batch * params.kv_heads;
    Carver parts(params.workspace);
    tile_counter = parts.take<int>(1);
    q_means = parts.take<float>(q_heads * params.q_blocks * params.head_dim);
    energies = parts.take<float>((q_heads + kv_heads) * kBandEnergies * kMaxEnergyChunks);
    key_scales = parts.take<float>(kv_heads * padded_keys);
    key_tiles = parts.take<uint4>(kv_heads * padded_keys * estimation_width(params.head_dim) / 4);
    strips = parts.take<float>(strip_rows * padded_keys);
    bytes = parts.bytes();
  }

  __host__ __device__ float* head_energies(int64_t head) const {
    return energies + head * kBandEnergies * kMaxEnergyChunks;
  }
};

// What the kernels of a selection read.
struct BandsArguments {
  SelectParams select;
  Band high;
  Band low;
  BandsWorkspace workspace;

  BandsArguments(const BandsParams& params, int64_t strip_rows)
      : select(params.select),
        high(params.high),
        low(params.low),
        workspace(params.select, strip_rows) {}
};

}  // namespace prism
