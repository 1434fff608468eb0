// The shared memory of a selecting CTA.
#pragma once

#include "kernels/select/key_stream.cuh"
#include "kernels/select/row_search.cuh"

namespace prism {

constexpr int kRowLanes = kSelectThreads / kRows;  // the half warp that owns a row
static_assert(kRowLanes == kSelectWarps && kRowLanes == kCandidates);

// Sum (or maximum) and number of weights.
struct Partial {
  float value;
  int count;
};

// The 32 query rows of a CTA: the query heads of one kv head side by side, block after block.
struct RowTile {
  int first;                // row of the kv head
  int kv_head;              // over the batch
  int rows;                 // that exist
  int group;                // query heads of a kv head
  int everywhere_visible;   // keys that every row sees
  int scored_words;         // mask words of keys that some row sees
  const uint4* head_tiles;  // of the kv head
  uint32_t slices[2];       // of 16 dimensions that hold any of the high, the low band
};

template <int kHeadDim, int kCluster, int kStages>
struct SharedStorage {
  typename KeyStream<kHeadDim, kCluster, kStages>::Buffer keys;
  QueryTiles<kHeadDim> queries;
  Partial partials[kRows][2 * kSelectWarps + 2];  // two a warp, padded against bank conflicts
  Partial exchange[2][kCluster][kRows];
  Candidate listed[kRows][kCandidates];
  uint32_t words[kRows][kSegmentWords + 1];  // kept bits of this CTA's tiles
  // What only the owners of rows need lies here: registers are for scores.
  RowTile tile;
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
