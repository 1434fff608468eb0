// The scheduler warp: draws tiles and describes them to the other warps, ahead of their work.
#pragma once

#include <cstdint>

#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/sm90/mask_row.cuh"
#include "kernels/attention/sm90/tensor_map.h"
#include "kernels/attention/tile_finder.cuh"

namespace prism::sm90 {

template <typename Config>
struct Scheduler {
  using Storage = typename Config::SharedStorage;
  static constexpr int kBoxN = Config::kBoxN;
  static constexpr int kBoxes = Config::kBoxes;
  using Descriptor = typename Config::Descriptor;

  const KernelArguments& arguments;
  const SparseAttentionParams& params;
  Storage& storage;
  Ring<Config::kStagesTile> tile_ring;
  TileFinder<Config::kTileM> finder;
  int nonempty = 0;  // tiles so far that keep any keys

  __device__ Scheduler(const KernelArguments& arguments, Storage& storage)
      : arguments(arguments),
        params(arguments.params),
        storage(storage),
        finder(arguments.params, arguments.kv_section) {}

  __device__ void run() {
    // The first tile is the CTA's own index, the others are drawn, if there are any.
    int index = static_cast<int>(blockIdx.x);
    Tile tile;
    while (index < arguments.tiles && finder.find(index, tile)) {
      int drawn = arguments.tiles - static_cast<int>(gridDim.x);  // there is no such tile
      if (params.tile_counter != nullptr && threadIdx.x % 32 == 0) {
        drawn = atomicAdd(params.tile_counter, 1);
      }
      publish(describe(tile));
      index = static_cast<int>(gridDim.x) + __shfl_sync(kAllLanes, drawn, 0);
    }
    Descriptor end{};
    end.trips = -1;
    publish(end);
  }

  __device__ void publish(Descriptor tile) {
    tile.position = tile_ring.count;
    storage.tile_free[tile_ring.stage()].wait(tile_ring.phase() ^ 1);
    if (threadIdx.x % 32 == 0) {
      storage.tile[tile_ring.stage()] = tile;
      storage.tile_full[tile_ring.stage()].arrive();
    }
    tile_ring.advance();
  }

  __device__ Descriptor describe(const Tile& tile) {
    const Sequence& sequence = tile.sequence;
    const TileRows rows(sequence.q_len, sequence.k_len, params.causal, tile.q_block,
                        Config::kTileM);
    const int box_end = (rows.k_end + kBoxN - 1) / kBoxN;
    const int boxes_per_block = Config::boxes_per_block(params);
    const int block_end = (box_end + boxes_per_block - 1) / boxes_per_block;
    const int64_t row =
        (static_cast<int64_t>(sequence.batch) * params.q_heads + tile.q_head) * arguments.q_blocks +
        tile.q_block;
    const MaskRow mask{params.bits + row * ((arguments.k_blocks + 31) / 32)};
    Descriptor descriptor;
    int kept = 0;
    if constexpr (Config::kScoreOptions) {
      const int window_first = rows.first_position - params.window_left;
      const bool window = params.window_left >= 0;
      descriptor.window_first = window ? window_first : -Config::kTileM;  // no row's is above 0
      descriptor.box_begin = max(descriptor.window_first, 0) / kBoxN;
      descriptor.block_begin = descriptor.box_begin / boxes_per_block;
      descriptor.visible_end = block_end;
      for (int chunk = MaskRow::chunk_of(descriptor.block_begin);
           chunk < MaskRow::chunks(block_end); ++chunk) {
        kept += __popc(mask.word(chunk, descriptor.block_begin, block_end)) * boxes_per_block;
      }
    } else {
      for (int chunk = 0; chunk < MaskRow::chunks(block_end); ++chunk) {
        kept += __popc(mask.word(chunk, block_end)) * boxes_per_block;
      }
    }
    kept = __reduce_add_sync(kAllLanes, kept);
    if (boxes_per_block == 2 && box_end % 2 == 1 && kept > 0 && mask.keeps(block_end - 1)) {
      --kept;  // the upper half of the last block lies past the last visible key
    }
    if constexpr (Config::kScoreOptions) {
      if (descriptor.box_begin % boxes_per_block == 1 && kept > 0 &&
          mask.keeps(descriptor.block_begin)) {
        --kept;  // the lower half of the first block lies before all windows
      }
    }
    descriptor.mask_words = mask.words;
    set_coordinates(sequence, rows.first, descriptor);
    descriptor.q_head = tile.q_head;
    descriptor.kv_head = tile.kv_head;
    descriptor.k_len = sequence.k_len;
    descriptor.first_position = params.causal ? rows.first_position : sequence.k_len;
    descriptor.trips = (kept + kBoxes - 1) / kBoxes;
    descriptor.box_end = box_end;
    descriptor.index = nonempty;
    nonempty += kept > 0;
    int first_masked = rows.first_masked(kBoxN);
    if constexpr (Config::kScoreOptions) {
      first_masked = max(first_masked, descriptor.box_begin);
    }
    descriptor.masked_boxes = masked_boxes(mask, first_masked, box_end);
    descriptor.padding_boxes = descriptor.trips * kBoxes - kept;
    if constexpr (Config::kScoreOptions) {
      const int last_first = descriptor.first_visible(Config::kTileM - 1);
      const int masked_end = min((last_first + kBoxN - 1) / kBoxN, box_end);
      descriptor.window_boxes = window_boxes(mask, descriptor.box_begin, masked_end);
      descriptor.window_trip =
          descriptor.trips - (__popc(descriptor.window_boxes) + kBoxes - 1) / kBoxes;
    }
    return descriptor;
  }

  __device__ void set_coordinates(const Sequence& sequence, int first_row,
                                  TileDescriptor& descriptor) const {
    if (params.ragged.is_ragged()) {
      descriptor.q_x = kSliceEnd - sequence.q_len + first_row;
      descriptor.q_y = sequence.q_start + sequence.q_len;
      descriptor.kv_x = kSliceEnd - sequence.k_len;
      descriptor.kv_y =
          params.ragged.is_paged() ? sequence.batch : sequence.k_start + sequence.k_len;
    } else {
      descriptor.q_x = first_row;
      descriptor.q_y = sequence.batch;
      descriptor.kv_x = 0;
      descriptor.kv_y = sequence.batch;
    }
  }

  // Bit i: the box `box_end` - 1 - i is kept and at or above `first_masked`.
  __device__ uint32_t masked_boxes(const MaskRow& mask, int first_masked, int box_end) const {
    const int box = box_end - 1 - static_cast<int>(threadIdx.x % 32);
    return __ballot_sync(kAllLanes, box >= first_masked && keeps(mask, box));
  }

  // Bit i: the box `box_begin` + i is kept and below `masked_end`.
  __device__ uint32_t window_boxes(const MaskRow& mask, int box_begin, int masked_end) const {
    const int box = box_begin + static_cast<int>(threadIdx.x % 32);
    return __ballot_sync(kAllLanes, box < masked_end && keeps(mask, box));
  }

  __device__ bool keeps(const MaskRow& mask, int box) const {
    return mask.keeps(box / Config::boxes_per_block(params));
  }
};

}  // namespace prism::sm90
