// The shared-memory plan of the Hopper attention kernel for float8 e4m3 keys and values.
#pragma once

#include <cstdint>

#include "kernels/attention/sm90/config.h"

namespace prism::sm90 {

// TMA brings fp8 tiles into a staging ring, as plain rows. A fourth warpgroup converts them into
// the 16-bit stages from which the consumers compute as ever.
template <typename Element_, int kHeadDim_, int kBlockN_>
struct Fp8AttentionConfig : AttentionConfig<Element_, kHeadDim_, kBlockN_, false> {
  using Base = AttentionConfig<Element_, kHeadDim_, kBlockN_, false>;
  using Base::kHeadDim;
  using Base::kPanelKV;
  using Base::kPanelQ;
  using Base::kPanels;
  using Base::kStagesQ;
  using Base::kStagesTile;
  using Base::kTileN;
  using typename Base::AtomK;
  using typename Base::AtomV;
  using typename Base::Element;
  static_assert(Base::kOutputInQueries, "no room for an output buffer");
  static constexpr bool kFp8 = true;
  static constexpr int kConverterThreads = 128;
  static constexpr int kConverterWarps = kConverterThreads / 32;
  static constexpr int kThreads = Base::kThreads + kConverterThreads;
  // A 16-bit stage is filled while the other is read; what is in flight waits in the staging ring.
  static constexpr int kStagesK = kHeadDim == 128 ? 2 : 4;
  static constexpr int kStagesV = kStagesK;
  static constexpr int kLoadStagesK = kStagesK / 2;
  static constexpr int kLoadStagesV = kStagesV / 2;
  static constexpr bool kOverlapsOutput = false;  // registers are scarcer still
  // 128 registers a thread at launch: 24 * 128 + 208 * 256 + 72 * 128 make the same sum.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 208;
  static constexpr int kConverterRegisters = 72;

  using SmemLayoutK = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStagesK>>{}));
  using SmemLayoutVt = decltype(cute::tile_to_shape(
      AtomV{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kStagesV>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  static constexpr uint32_t kLoadBytesKV = kTileN * kHeadDim;  // one stage

  // What the loaders fill and the converters empty.
  struct Staging {
    alignas(128) uint8_t k[kLoadStagesK][1][kTileN * kHeadDim];
    alignas(128) uint8_t v[kLoadStagesV][1][kTileN * kHeadDim];
    cutlass::arch::ClusterTransactionBarrier k_full[kLoadStagesK];
    cutlass::arch::ClusterBarrier k_free[kLoadStagesK];
    cutlass::arch::ClusterTransactionBarrier v_full[kLoadStagesV];
    cutlass::arch::ClusterBarrier v_free[kLoadStagesV];
  };

  struct SharedStorage {
    alignas(1024) Element q[kStagesQ][kPanels][kPanelQ];
    alignas(1024) Element k[kStagesK][kPanels][kPanelKV];
    alignas(1024) Element v[kStagesV][kPanels][kPanelKV];
    Staging staging;
    cutlass::arch::ClusterTransactionBarrier q_full[kStagesQ];
    cutlass::arch::ClusterBarrier q_free[kStagesQ];
    cutlass::arch::ClusterBarrier k_full[kStagesK];
    cutlass::arch::ClusterBarrier k_free[kStagesK];
    cutlass::arch::ClusterBarrier v_full[kStagesV];
    cutlass::arch::ClusterBarrier v_free[kStagesV];
    cutlass::arch::ClusterBarrier tile_full[kStagesTile];
    cutlass::arch::ClusterBarrier tile_free[kStagesTile];
    typename Base::Descriptor tile[kStagesTile];
  };
  static constexpr int kSmemBytes = static_cast<int>(sizeof(SharedStorage));
  static_assert(kSmemBytes <= 232448, "more than a CTA gets on Hopper");

  __device__ static Staging& load_target(SharedStorage& storage) { return storage.staging; }
};

}  // namespace prism::sm90
