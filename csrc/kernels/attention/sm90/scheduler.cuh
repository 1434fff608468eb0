// The scheduler warp: draws tiles and describes them to the other warps, ahead of their work.
#pragma once

#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/sm90/mask_row.cuh"
#include "kernels/attention/tile_coord.h"

namespace prism::sm90 {

template <typename Config>
struct Scheduler {
  using Storage = typename Config::SharedStorage;
  static constexpr int kBoxN = Config::kBoxN;
  static constexpr int kBoxes = Config::kBoxes;
  static constexpr int kBoxesPerBlock = Config::kBoxesPerBlock;

  const KernelArguments<Config>& arguments;
  const SparseAttentionParams& params;
  Storage& storage;
  Ring<Config::kStagesTile> tile_ring;
  int nonempty = 0;  // tiles so far that keep any keys

  __device__ Scheduler(const KernelArguments<Config>& arguments, Storage& storage)
      : arguments(arguments), params(arguments.params), storage(storage) {}

  __device__ void run() {
    // The first tile is the CTA's own index, the others are drawn.
    int index = static_cast<int>(blockIdx.x);
    while (index < arguments.tiles) {
      int drawn = 0;
      if (threadIdx.x % 32 == 0) {
        drawn = atomicAdd(params.tile_counter, 1);
      }
      publish(describe(index));
      index = static_cast<int>(gridDim.x) + __shfl_sync(kAllLanes, drawn, 0);
    }
    TileDescriptor end{};
    end.q_block = -1;
    publish(end);
  }

  __device__ void publish(const TileDescriptor& tile) {
    storage.tile_free[tile_ring.stage()].wait(tile_ring.phase() ^ 1);
    if (threadIdx.x % 32 == 0) {
      storage.tile[tile_ring.stage()] = tile;
      storage.tile_full[tile_ring.stage()].arrive();
    }
    tile_ring.advance();
  }

  __device__ TileDescriptor describe(int index) {
    const TileCoord coord(params, index, arguments.q_blocks, arguments.kv_section);
    const TileRows rows(params, coord.q_block, Config::kTileM);
    const int box_end = (rows.k_end + kBoxN - 1) / kBoxN;
    const int block_end = (box_end + kBoxesPerBlock - 1) / kBoxesPerBlock;
    const int64_t row =
        (static_cast<int64_t>(coord.batch) * params.q_heads + coord.q_head) * arguments.q_blocks +
        coord.q_block;
    const MaskRow mask{params.bits + row * ((arguments.k_blocks + 31) / 32)};
    int kept = 0;
    for (int chunk = 0; chunk < MaskRow::chunks(block_end); ++chunk) {
      kept += __popc(mask.word(chunk, block_end)) * kBoxesPerBlock;
    }
    kept = __reduce_add_sync(kAllLanes, kept);
    if (kBoxesPerBlock == 2 && box_end % 2 == 1 && kept > 0 && mask.keeps(block_end - 1)) {
      --kept;  // the upper half of the last block lies past the last visible key
    }
    TileDescriptor tile;
    tile.mask_words = mask.words;
    tile.q_block = coord.q_block;
    tile.q_head = coord.q_head;
    tile.kv_head = coord.kv_head;
    tile.batch = coord.batch;
    tile.trips = (kept + kBoxes - 1) / kBoxes;
    tile.box_end = box_end;
    tile.index = nonempty;
    nonempty += kept > 0;
    tile.masked_boxes = masked_boxes(mask, rows.first_masked(params, kBoxN), box_end);
    tile.padding_boxes = tile.trips * kBoxes - kept;
    return tile;
  }

  // Bit i: the box `box_end` - 1 - i is kept and at or above `first_masked`.
  __device__ static uint32_t masked_boxes(const MaskRow& mask, int first_masked, int box_end) {
    const int box = box_end - 1 - static_cast<int>(threadIdx.x % 32);
    return __ballot_sync(kAllLanes, box >= first_masked && mask.keeps(box / kBoxesPerBlock));
  }
};

}  // namespace prism::sm90
