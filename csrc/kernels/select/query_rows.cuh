// The query rows of a CTA: the query heads of one kv head side by side, block after block, so that
// a key mean read from memory serves all of them.
#pragma once

#include "kernels/pool/emit_means.cuh"
#include "kernels/select/key_stream.cuh"
#include "kernels/select/row_range.cuh"
#include "kernels/select/temperature.cuh"

namespace prism {

constexpr int kRowLanes = 16;  // the half warp that prepares a row

struct RowTile {
  int first;                // row of the kv head
  int kv_head;              // over the batch
  int rows;                 // that exist
  int group;                // query heads of a kv head
  int everywhere_visible;   // keys that every row sees
  int scored_words;         // mask words of keys that some row sees; 0: all are kept, unscored
  const uint4* head_tiles;  // of the kv head
  uint32_t slices[2];       // of 16 dimensions that hold any of the high, the low band

  // Tile `index` of those of kRows rows. The last rows see the most keys: they go first.
  template <int kHeadDim, int kRows>
  __device__ static RowTile make(const SelectBlocksParams& params, int index) {
    const int kv_heads = static_cast<int>(params.batch) * params.kv_heads;
    const int group = params.q_heads / params.kv_heads;
    const int rows = group * static_cast<int>(params.q_blocks);
    const int first = ((rows + kRows - 1) / kRows - 1 - index / kv_heads) * kRows;
    const int last = min(first + kRows, rows) - 1;
    const SelectWorkspace workspace(params);
    return {first,
            index % kv_heads,
            last - first + 1,
            group,
            row_range(params, first / group).visible,
            params.top_p < 1.0 ? (row_range(params, last / group).visible + 31) / 32 : 0,
            workspace.key_tiles +
                index % kv_heads * (workspace.padded_keys / kKeyTile) * (kHeadDim / kDimSlice * 32),
            {band_slices(params.high), band_slices(params.low)}};
  }

  // Query head over the batch, and query block.
  __device__ int q_head(int row) const { return kv_head * group + (first + row) % group; }
  __device__ int q_block(int row) const { return (first + row) / group; }

  // log2(e) / (sqrt(d_z) tau_z) of both bands for an existing row, in all lanes of a half warp.
  __device__ float2 band_scales(const SelectBlocksParams& params, int row) const {
    constexpr float kLog2E = 1.4426950408889634f;
    const SelectWorkspace workspace(params);
    const int batch = kv_head / params.kv_heads;
    const HeadEnergies q(workspace.head_energies(q_head(row) + batch * params.kv_heads),
                         EnergyChunks(params.q_blocks).count);
    const HeadEnergies k(workspace.head_energies(kv_head + (batch + 1) * params.q_heads),
                         EnergyChunks(params.k_blocks).count);
    return {kLog2E * logit_scale(params, q, k, kHighEnergy, params.high.size),
            kLog2E * logit_scale(params, q, k, kLowEnergy, params.low.size)};
  }

  // Scales and splits a row's dimensions of the band, zero elsewhere and where the row is not
  // `active`: by the half warp of lanes `lane`. Returns what undoes the scaling.
  template <int kHeadDim, int kRowTiles>
  __device__ float write_query(const SelectBlocksParams& params, const Band& band, int row,
                               bool active, QueryTiles<kHeadDim, kRowTiles>& queries) const {
    constexpr int kQuads = kHeadDim / 4 / kRowLanes;  // of dimensions, a lane
    const int row_lane = threadIdx.x % kRowLanes;
    float4 values[kQuads];
    float largest = 0.f;
    const int head = q_head(active ? row : 0);
    const float* source = static_cast<const float*>(params.q_means.data) +
                          head / params.q_heads * params.q_means.batch_stride +
                          head % params.q_heads * params.q_means.head_stride +
                          q_block(active ? row : 0) * params.q_means.row_stride;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int dim = (i * kRowLanes + row_lane) * 4;
      const uint32_t used = active ? band_nibble(band, dim) : 0;
      values[i] = {used & 1 ? source[dim] : 0.f, used & 2 ? source[dim + 1] : 0.f,
                   used & 4 ? source[dim + 2] : 0.f, used & 8 ? source[dim + 3] : 0.f};
      values[i] = finite_or_zero(values[i]);
      largest = fmaxf(largest, largest_magnitude(values[i]));
    }
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    const HalfScale factor(largest);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = i * kRowLanes + row_lane;
      const float4 x = values[i];
      const uint4 split = split_halves(
          {x.x * factor.scale, x.y * factor.scale, x.z * factor.scale, x.w * factor.scale});
      auto& tile = queries[row / 16][quad / 4];
      const int lane = row % 8 * 4 + quad % 4;
      const int half = row / 8 % 2;
      auto* nearest = reinterpret_cast<uint32_t*>(&tile[0][lane]);
      auto* rest = reinterpret_cast<uint32_t*>(&tile[1][lane]);
      nearest[half] = split.x;
      nearest[half + 2] = split.y;
      rest[half] = split.z;
      rest[half + 2] = split.w;
    }
    return factor.inverse;
  }

  __device__ uint32_t* row_words(const SelectBlocksParams& params, int row) const {
    const int64_t words = (params.k_blocks + 31) / 32;
    return params.bits + (q_head(row) * params.q_blocks + q_block(row)) * words;
  }
  __device__ int32_t* row_count(const SelectBlocksParams& params, int row) const {
    return params.counts + q_head(row) * params.q_blocks + q_block(row);
  }
};

}  // namespace prism
