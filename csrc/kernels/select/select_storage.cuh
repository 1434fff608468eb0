// How a CTA shares long rows, and its shared memory.
#pragma once

#include "kernels/select/query_rows.cuh"
#include "kernels/select/row_search.cuh"

namespace prism {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kRows = 32;     // query rows of a CTA
constexpr int kRowTiles = 2;  // as mma tiles of 16
constexpr int kTiles = 8;     // key tiles whose scores a warp holds in registers
constexpr int kSegmentTiles = kTiles * kSelectWarps;
constexpr int kSegmentWords = kSegmentTiles * kKeyTile / 32;
static_assert(kRowLanes * kRows == kSelectThreads);
static_assert(kRowLanes == kSelectWarps && kRowLanes == kCandidates);

// Mask words go around the CTAs of a cluster, key tiles around the warps of a CTA: whatever the
// number of visible keys, every warp has its share. This is the share of one warp in a segment.
template <int kCluster>
struct WarpTiles {
  static constexpr int kStride = kSelectWarps * kCluster;  // from one tile to the warp's next

  int count;  // up to kTiles
  int first;  // among all tiles of the kv head

  __device__ WarpTiles(int segment, int cta_tiles, int rank) {
    const int warp = threadIdx.x / 32;
    const int left = cta_tiles - segment * kSegmentTiles - warp;
    count = min((left + kSelectWarps - 1) / kSelectWarps, kTiles);
    first = ((segment * kSegmentWords + warp / 4) * kCluster + rank) * 4 + warp % 4;
  }
};

template <int kHeadDim, int kCluster, int kStages>
using SegmentStream =
    KeyStream<kHeadDim, kRowTiles, kSelectThreads, kStages, WarpTiles<kCluster>::kStride>;

// Sum (or maximum) and number of weights.
struct Partial {
  float value;
  int count;
};

template <int kHeadDim, int kCluster, int kStages>
struct SharedStorage {
  typename SegmentStream<kHeadDim, kCluster, kStages>::Buffer keys;
  QueryTiles<kHeadDim, kRowTiles> queries;
  Partial partials[kRows][2 * kSelectWarps + 2];  // two a warp, padded against bank conflicts
  Partial exchange[2][kCluster][kRows];
  Candidate listed[kRows][kCandidates];
  uint32_t words[kRows][kSegmentWords + 1];  // kept bits of this CTA's tiles
  // What only the owners of rows need lies here: registers are for scores.
  RowTile tile;
  int segments;  // of this CTA's keys, whose scores registers hold at a time
  RowSearch search[kRows];
  float band_scale[2][kRows];
  int list_size[kRows];
  int visible[kRows];
  int counts[kRows];
  int exchanges[kRows];
  int keep_all[kRows];
  // weight = exp2(score * scale - shift)
  float scale[kRows];
  float shift[kRows];
  // What the row's owner wants evaluated: a threshold, bounds, or the cut.
  uint32_t bound[kRows];
  int limit[kRows];
};

}  // namespace prism
