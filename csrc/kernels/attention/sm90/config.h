// Tiles, layouts and the shared-memory plan of the Hopper attention kernel.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/tensor.hpp>

#include <cstdint>
#include <cute/atom/mma_atom.hpp>  // needs tensor.hpp before it
#include <type_traits>

#include "kernels/attention/sm90/tile_descriptor.h"
#include "kernels/params.h"

namespace prism::sm90 {

namespace detail {

// The 128-byte swizzle, whose rows are 64 elements.
template <cute::GMMA::Major kMajor, typename Element, int kColumns>
constexpr auto smem_atom() {
  static_assert(kColumns % 64 == 0, "64 half-precision elements fill one 128-byte swizzle row");
  if constexpr (kMajor == cute::GMMA::Major::K) {
    return cute::GMMA::Layout_K_SW128_Atom<Element>{};
  } else {
    return cute::GMMA::Layout_MN_SW128_Atom<Element>{};
  }
}

}  // namespace detail

// A producer warpgroup feeds two consumer warpgroups of 64 query rows each through TMA. kTileM is
// the query block size, kBlockN the key block size of the mask. Keys are computed kTileN at a time
// and loaded in boxes of kBoxN: a tile is one key block, two smaller ones, or half of a larger one.
//
// kScoreOptions: softcap and windows. It takes every key block of kBlockN or a multiple.
template <typename Element_, int kHeadDim_, int kBlockN_, bool kScoreOptions_>
struct AttentionConfig {
  using Element = Element_;
  using Descriptor = std::conditional_t<kScoreOptions_, WindowTileDescriptor, TileDescriptor>;
  static constexpr bool kScoreOptions = kScoreOptions_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kTileM = 128;
  // The output accumulators of head_dim 256 leave registers for half as many scores.
  static constexpr int kTileN = kHeadDim == 256 ? 64 : 128;
  static constexpr int kBoxN = kBlockN < kTileN ? kBlockN : kTileN;
  static constexpr int kBoxes = kTileN / kBoxN;  // boxes of one tile
  static constexpr int kConsumers = 2;           // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kThreads = 128 + kConsumerThreads;
  // K and V bytes in flight matter, not tiles: smaller tiles get more stages. K has a third one at
  // head_dim 128: then its copies leave the bandwidth to those of V, which are wanted first.
  static constexpr int kStagesV = 2 * (128 * 128) / (kTileN * kHeadDim);
  static constexpr int kStagesK = kHeadDim == 128 ? 3 : kStagesV;
  // The rings that the loaders fill: these, or others in front of them (config_fp8.h).
  static constexpr bool kFp8 = false;
  static constexpr int kLoadStagesK = kStagesK;
  static constexpr int kLoadStagesV = kStagesV;
  // The next tile's queries arrive while this one is computed, where there is room for them.
  static constexpr int kStagesQ = kHeadDim == 256 ? 1 : 2;
  // The output leaves through the stage of its queries if the next queries have another one.
  static constexpr bool kOutputInQueries = kStagesQ == 2;
  static constexpr int kStagesTile = 2;  // the tile in work and the next
  // Whether the consumers take turns on the tensor cores. Beyond head_dim 128 products take so much
  // longer than the softmax that they need not.
  static constexpr bool kTakeTurns = kHeadDim <= 128;
  // Whether P V of a key tile is still being computed while the softmax of the next one writes its
  // probabilities: into registers of their own.
  static constexpr bool kOverlapsOutput = true;
  // 168 registers a thread at launch: 24 * 128 + 240 * 256 make the same sum.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr bool kIsHalf = std::is_same_v<Element, cutlass::half_t>;

  // Boxes of one key block of the mask.
  __device__ static int boxes_per_block(const SparseAttentionParams& params) {
    return (kScoreOptions ? params.k_block_size : kBlockN) / kBoxN;
  }

  using TileShapeQK = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kHeadDim>>;
  using TileShapePV = cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>, cute::Int<kTileN>>;
  using AtomLayout = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
  using TiledMmaQK = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, TileShapeQK>(), AtomLayout{}));
  // P comes from registers; V stays row-major in shared memory: an MN-major B operand.
  using TiledMmaPV = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, TileShapePV, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>(),
      AtomLayout{}));

  using AtomK = decltype(detail::smem_atom<cute::GMMA::Major::K, Element, kHeadDim>());
  using AtomV = decltype(detail::smem_atom<cute::GMMA::Major::MN, Element, kHeadDim>());
  using SmemLayoutQ = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>, cute::Int<kStagesQ>>{}));
  using SmemLayoutK = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStagesK>>{}));
  // (head_dim, keys): the operand's view of V.
  using SmemLayoutVt = decltype(cute::tile_to_shape(
      AtomV{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kStagesV>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));
  // In each of them a stage is a row of panels of 64 columns: what one swizzle row holds, and what
  // TMA moves at a time.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPanelQ = kTileM * 64;  // elements
  static constexpr int kPanelKV = kTileN * 64;
  static constexpr int kPanelO = 64 * 64;
  // A warpgroup's output goes through as many panels at a time as there is room for.
  static constexpr int kPanelsO = kOutputInQueries ? kPanels : 2;

  static constexpr uint32_t kBytesQ = kTileM * kHeadDim * sizeof(Element);       // one stage
  static constexpr uint32_t kLoadBytesKV = kTileN * kHeadDim * sizeof(Element);  // one stage

  struct NoBuffer {};
  struct OutputBuffer {
    alignas(1024) Element panels[kConsumers][kPanelsO][kPanelO];
  };

  struct SharedStorage {
    alignas(1024) Element q[kStagesQ][kPanels][kPanelQ];
    alignas(1024) Element k[kStagesK][kPanels][kPanelKV];
    alignas(1024) Element v[kStagesV][kPanels][kPanelKV];
    std::conditional_t<kOutputInQueries, NoBuffer, OutputBuffer> output;
    cutlass::arch::ClusterTransactionBarrier q_full[kStagesQ];
    cutlass::arch::ClusterBarrier q_free[kStagesQ];
    cutlass::arch::ClusterTransactionBarrier k_full[kStagesK];
    cutlass::arch::ClusterBarrier k_free[kStagesK];
    cutlass::arch::ClusterTransactionBarrier v_full[kStagesV];
    cutlass::arch::ClusterBarrier v_free[kStagesV];
    cutlass::arch::ClusterBarrier tile_full[kStagesTile];
    cutlass::arch::ClusterBarrier tile_free[kStagesTile];
    Descriptor tile[kStagesTile];
  };
  static constexpr int kSmemBytes = static_cast<int>(sizeof(SharedStorage));
  static_assert(kSmemBytes <= 232448, "more than a CTA gets on Hopper");

  // Where the loaders find k and v and their barriers.
  __device__ static SharedStorage& load_target(SharedStorage& storage) { return storage; }
};

}  // namespace prism::sm90
