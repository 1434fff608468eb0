// The loader warps: one keeps the stages of Q and K full, the other those of V, so that neither
// waits behind a stage that the other may fill already.
#pragma once

#include <cstdint>

#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/sm90/mask_row.cuh"
#include "kernels/attention/sm90/tensor_map.h"

namespace prism::sm90 {

using namespace cute;

enum class Operand { kKeys, kValues };

template <typename Config, Operand kOperand>
struct Loader {
  using Storage = typename Config::SharedStorage;
  static constexpr bool kKeys = kOperand == Operand::kKeys;
  static constexpr int kBoxN = Config::kBoxN;
  static constexpr int kBoxes = Config::kBoxes;
  using Tile = typename Config::Descriptor;

  const KernelArguments& arguments;
  const SparseAttentionParams& params;
  Storage& storage;
  Ring<Config::kStagesTile> tile_ring;
  Ring<kKeys ? Config::kLoadStagesK : Config::kLoadStagesV> ring;

  __device__ Loader(const KernelArguments& arguments, Storage& storage)
      : arguments(arguments), params(arguments.params), storage(storage) {}

  // All lanes walk the mask together; each issues its share of the copies.
  __device__ void run() {
    for (;;) {
      storage.tile_full[tile_ring.stage()].wait(tile_ring.phase());
      const Tile& tile = storage.tile[tile_ring.stage()];
      if (tile.is_end()) {
        return;
      }
      if (tile.trips > 0) {
        load_queries(tile);
        load_boxes(tile);
      }
      // From shared memory, so that it takes no register meanwhile.
      tile_ring.count = const_cast<const volatile uint32_t&>(tile.position);
      storage.tile_free[tile_ring.stage()].arrive();
      tile_ring.advance();
    }
  }

  __device__ int boxes_per_block() const { return Config::boxes_per_block(params); }

  // What the mask keeps of the blocks that the tile may see; see MaskRow.
  __device__ static int first_chunk(const Tile& tile) {
    if constexpr (Config::kScoreOptions) {
      return MaskRow::chunk_of(tile.block_begin);
    } else {
      return 0;
    }
  }
  __device__ static int last_chunk(const Tile& tile) {
    if constexpr (Config::kScoreOptions) {
      return MaskRow::chunks(tile.visible_end) - 1;
    } else {
      return MaskRow::chunks(tile.block_end(Config::kBlockN / kBoxN)) - 1;
    }
  }
  __device__ uint32_t kept_blocks(const Tile& tile, int chunk) const {
    const MaskRow mask{tile.mask_words};
    if constexpr (Config::kScoreOptions) {
      return mask.word(chunk, tile.block_begin, tile.visible_end);
    } else {
      return mask.word(chunk, tile.block_end(Config::kBlockN / kBoxN));
    }
  }

  __device__ static bool is_leader() { return threadIdx.x % 32 == 0; }

  // Queries first: their stage is free long before that of the first keys.
  __device__ void load_queries(const Tile& tile) {
    if (kKeys && is_leader()) {
      const Ring<Config::kStagesQ> q_ring{static_cast<uint32_t>(tile.index)};
      storage.q_free[q_ring.stage()].wait(q_ring.phase() ^ 1);
      auto& full = storage.q_full[q_ring.stage()];
      full.arrive_and_expect_tx(Config::kBytesQ);
      load(arguments.tma_q, full, TMA::CacheHintSm90::EVICT_FIRST, storage.q[q_ring.stage()], 0,
           tile.q_x, tile.q_head, tile.q_y);
    }
    __syncwarp();
  }

  // Loads the kept boxes in descending order, after those of padding.
  __device__ void load_boxes(const Tile& tile) {
    // A box past the last key is filled with zeros and costs no traffic.
    int boxes[kBoxes] = {tile.padding_boxes == 0 ? -1 : (tile.k_len + kBoxN - 1) / kBoxN};
    for (int chunk = last_chunk(tile); chunk >= first_chunk(tile); --chunk) {
      uint32_t own_word = kept_blocks(tile, chunk);
      // The highest block left is looked for anew each time: registers are scarce.
      while (const uint32_t lanes = __ballot_sync(kAllLanes, own_word != 0)) {
        const int lane = 31 - __clz(static_cast<int>(lanes));
        const int bit = 31 - __clz(static_cast<int>(__shfl_sync(kAllLanes, own_word, lane)));
        if (static_cast<int>(threadIdx.x % 32) == lane) {
          own_word ^= 1u << bit;
        }
        const int block = (chunk * 32 + lane) * 32 + bit;
        const auto load_box = [&](int box) CUTLASS_LAMBDA_FUNC_INLINE {
          if (boxes_per_block() > 1 && tile.leaves_out(box)) {
            return;
          }
          if (kBoxes == 2 && boxes[0] < 0) {
            boxes[0] = box;
            return;
          }
          boxes[kBoxes - 1] = box;
          load_key_tile(boxes, tile);
          boxes[0] = -1;
        };
        const int first_box = block * boxes_per_block();
        if constexpr (Config::kScoreOptions) {
#pragma unroll 1
          for (int box = first_box + boxes_per_block() - 1; box >= first_box; --box) {
            load_box(box);
          }
        } else {
#pragma unroll
          for (int i = boxes_per_block() - 1; i >= 0; --i) {
            load_box(first_box + i);
          }
        }
      }
    }
  }

  __device__ void load_key_tile(const int (&boxes)[kBoxes], const Tile& tile) {
    // Lane i moves rows [i * copy_rows, (i + 1) * copy_rows) of the tile.
    const int target_row = static_cast<int>(threadIdx.x % 32) * arguments.copy_rows;
    const bool takes_part = target_row < Config::kTileN;
    const int box = kBoxes == 2 && target_row >= kBoxN ? boxes[kBoxes - 1] : boxes[0];
    const int key = box * kBoxN + target_row % kBoxN;
    int x = tile.kv_x + key;
    int y = tile.kv_y;
    if (params.ragged.is_paged() && takes_part) {
      find_page_row(tile, key, x, y);
    }
    const uint32_t stage = ring.stage();
    auto& loads = Config::load_target(storage);
    auto& free = kKeys ? loads.k_free[stage] : loads.v_free[stage];
    auto& full = kKeys ? loads.k_full[stage] : loads.v_full[stage];
    auto& target = kKeys ? loads.k[stage] : loads.v[stage];
    free.wait(ring.phase() ^ 1);
    if (is_leader()) {
      full.arrive_and_expect_tx(Config::kLoadBytesKV);
    }
    __syncwarp();
    if (takes_part) {
      load(kKeys ? arguments.tma_k : arguments.tma_v, full, TMA::CacheHintSm90::EVICT_LAST, target,
           target_row, x, tile.kv_head, y);
    }
    ring.advance();
  }

  // Coordinates of a key in its page, a slice that ends with the last key written. What lies past
  // that, or in no page of the pool, becomes zeros; its page is not looked up.
  __device__ void find_page_row(const Tile& tile, int key, int& x, int& y) const {
    const RaggedBatch& ragged = params.ragged;
    const int slot = key & (ragged.page_size() - 1);
    const int filled = min(tile.k_len - (key - slot), ragged.page_size());
    x = kSliceEnd;
    y = 0;
    if (slot < filled) {
      const int32_t page =
          __ldg(ragged.block_table + tile.kv_y * ragged.table_stride + (key >> ragged.page_shift));
      if (ragged.has_page(page)) {
        x = kSliceEnd - filled + slot;
        y = page * arguments.page_stride + filled;
      }
    }
  }

  // Rows from (x, y) on into the rows from `target_row` on of each panel.
  template <typename Target, int kPanels, int kPanel>
  __device__ void load(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                       TMA::CacheHintSm90 hint, Target (&target)[kPanels][kPanel], int target_row,
                       int x, int head, int y) const {
    constexpr int kColumns = Config::kHeadDim / kPanels;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(hint),
                             &target[panel][target_row * kColumns], panel * kColumns, x, head, y,
                             arguments.z);
    }
  }
};

}  // namespace prism::sm90
