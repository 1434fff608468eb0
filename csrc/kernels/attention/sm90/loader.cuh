// The loader warps: one keeps the stages of Q and K full, the other those of V, so that neither
// waits behind a stage that the other may fill already.
#pragma once

#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/sm90/mask_row.cuh"

namespace prism::sm90 {

using namespace cute;

enum class Operand { kKeys, kValues };

template <typename Config, Operand kOperand>
struct Loader {
  using Element = typename Config::Element;
  using Storage = typename Config::SharedStorage;
  static constexpr bool kKeys = kOperand == Operand::kKeys;
  static constexpr int kBoxN = Config::kBoxN;
  static constexpr int kBoxes = Config::kBoxes;
  static constexpr int kBoxesPerBlock = Config::kBoxesPerBlock;

  const KernelArguments<Config>& arguments;
  const SparseAttentionParams& params;
  Storage& storage;
  Ring<Config::kStagesTile> tile_ring;
  Ring<kKeys ? Config::kStagesK : Config::kStagesV> ring;

  __device__ Loader(const KernelArguments<Config>& arguments, Storage& storage)
      : arguments(arguments), params(arguments.params), storage(storage) {}

  // Lane 0 issues the copies.
  __device__ void run() {
    for (;;) {
      storage.tile_full[tile_ring.stage()].wait(tile_ring.phase());
      const TileDescriptor& tile = storage.tile[tile_ring.stage()];
      if (tile.is_end()) {
        return;
      }
      if (tile.trips > 0) {
        load_boxes(tile, threadIdx.x % 32 == 0);
      }
      storage.tile_free[tile_ring.stage()].arrive();
      tile_ring.advance();
    }
  }

  // Loads the kept boxes in descending order, after those of padding.
  __device__ void load_boxes(const TileDescriptor& tile, bool leader) {
    if (kKeys && leader) {
      const Ring<Config::kStagesQ> q_ring{static_cast<uint32_t>(tile.index)};
      // Queries first: their stage is free long before that of the first keys.
      storage.q_free[q_ring.stage()].wait(q_ring.phase() ^ 1);
      auto& full = storage.q_full[q_ring.stage()];
      full.arrive_and_expect_tx(Config::kBytesQ);
      load(arguments.tma_q, full, TMA::CacheHintSm90::EVICT_FIRST, storage.q[q_ring.stage()], 0,
           tile.q_block * Config::kTileM, tile.q_head, tile.batch);
    }
    // A box past the last key is filled with zeros and costs no traffic.
    int boxes[kBoxes] = {tile.padding_boxes == 0 ? -1 : (params.k_len + kBoxN - 1) / kBoxN};
    for (int chunk = MaskRow::chunks(tile.block_end(kBoxesPerBlock)) - 1; chunk >= 0; --chunk) {
      const uint32_t own_word =
          MaskRow{tile.mask_words}.word(chunk, tile.block_end(kBoxesPerBlock));
      uint32_t lanes = __ballot_sync(kAllLanes, own_word != 0);
      while (lanes != 0) {
        const int lane = 31 - __clz(static_cast<int>(lanes));
        lanes ^= 1u << lane;
        uint32_t word = __shfl_sync(kAllLanes, own_word, lane);
        while (leader && word != 0) {
          const int bit = 31 - __clz(static_cast<int>(word));
          word ^= 1u << bit;
          const int block = (chunk * 32 + lane) * 32 + bit;
#pragma unroll
          for (int i = kBoxesPerBlock - 1; i >= 0; --i) {
            const int box = block * kBoxesPerBlock + i;
            if (kBoxesPerBlock > 1 && box >= tile.box_end) {
              continue;
            }
            if (kBoxes == 2 && boxes[0] < 0) {
              boxes[0] = box;
              continue;
            }
            boxes[kBoxes - 1] = box;
            load_key_tile(boxes, tile);
            boxes[0] = -1;
          }
        }
      }
    }
    __syncwarp();
  }

  __device__ void load_key_tile(const int (&boxes)[kBoxes], const TileDescriptor& tile) {
    const uint32_t stage = ring.stage();
    auto& free = kKeys ? storage.k_free[stage] : storage.v_free[stage];
    auto& full = kKeys ? storage.k_full[stage] : storage.v_full[stage];
    auto& target = kKeys ? storage.k[stage] : storage.v[stage];
    free.wait(ring.phase() ^ 1);
    full.arrive_and_expect_tx(Config::kBytesKV);
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      load(kKeys ? arguments.tma_k : arguments.tma_v, full, TMA::CacheHintSm90::EVICT_LAST, target,
           i * kBoxN, boxes[i] * kBoxN, tile.kv_head, tile.batch);
    }
    ring.advance();
  }

  // Rows from `row` on into the rows from `target_row` on of each panel.
  template <typename Tma, int kPanel>
  __device__ static void load(const Tma& tma, cutlass::arch::ClusterTransactionBarrier& full,
                              TMA::CacheHintSm90 hint, Element (&target)[Config::kPanels][kPanel],
                              int target_row, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      SM90_TMA_LOAD_4D::copy(tma.get_tma_descriptor(), reinterpret_cast<uint64_t*>(&full),
                             static_cast<uint64_t>(hint), &target[panel][target_row * 64],
                             panel * 64, row, head, batch);
    }
  }
};

}  // namespace prism::sm90
