// Tiles, layouts and the shared-memory plan of the Hopper attention kernel.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <cute/tensor.hpp>

#include <cute/atom/mma_atom.hpp>  // needs tensor.hpp before it
#include <type_traits>

namespace prism::sm90 {

namespace detail {

// The widest swizzle whose row divides `kColumns` elements.
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

// A producer warpgroup feeds two consumer warpgroups of 64 query rows each through TMA; kTileM is
// the query block size, kTileN the key block size.
template <typename Element_, int kHeadDim_, int kTileN_>
struct AttentionConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileM = 128;
  static constexpr int kTileN = kTileN_;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kThreads = 128 + kConsumerThreads;
  // K and V bytes in flight matter, not tiles: smaller tiles get more stages.
  static constexpr int kStages = 2 * (128 * 128) / (kTileN * kHeadDim);
  // 168 registers a thread at launch: 24 * 128 + 240 * 256 make the same sum.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr bool kIsHalf = std::is_same_v<Element, cutlass::half_t>;

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
  using SmemLayoutQ =
      decltype(cute::tile_to_shape(AtomK{}, cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>>{}));
  using SmemLayoutK = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  // (head_dim, keys): the operand's view of V.
  using SmemLayoutVt = decltype(cute::tile_to_shape(
      AtomV{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  static constexpr uint32_t kBytesQ = kTileM * kHeadDim * sizeof(Element);
  static constexpr uint32_t kBytesKV = kTileN * kHeadDim * sizeof(Element);  // one stage

  // (rows, head_dim, heads, batch) and, for V, (head_dim, rows, heads, batch) in global memory.
  using GmemShape = cute::Shape<int32_t, cute::Int<kHeadDim>, int32_t, int32_t>;
  using GmemStride = cute::Stride<int64_t, cute::_1, int64_t, int64_t>;
  using GmemShapeVt = cute::Shape<cute::Int<kHeadDim>, int32_t, int32_t, int32_t>;
  using GmemStrideVt = cute::Stride<cute::_1, int64_t, int64_t, int64_t>;
  using TmaQ = decltype(cute::make_tma_copy(
      cute::SM90_TMA_LOAD{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<const Element*>(nullptr)), GmemShape{},
                        GmemStride{}),
      SmemLayoutQ{}, cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>>{}, cute::_1{}));
  using TmaK = decltype(cute::make_tma_copy(
      cute::SM90_TMA_LOAD{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<const Element*>(nullptr)), GmemShape{},
                        GmemStride{}),
      cute::take<0, 2>(SmemLayoutK{}), cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>>{},
      cute::_1{}));
  using TmaVt = decltype(cute::make_tma_copy(
      cute::SM90_TMA_LOAD{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<const Element*>(nullptr)), GmemShapeVt{},
                        GmemStrideVt{}),
      cute::take<0, 2>(SmemLayoutVt{}), cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>>{},
      cute::_1{}));

  struct SharedStorage {
    alignas(1024) cute::array_aligned<Element, cute::cosize_v<SmemLayoutQ>, 1024> q;
    alignas(1024) cute::array_aligned<Element, cute::cosize_v<SmemLayoutK>, 1024> k;
    alignas(1024) cute::array_aligned<Element, cute::cosize_v<SmemLayoutVt>, 1024> v;
    cutlass::arch::ClusterTransactionBarrier q_full;
    cutlass::arch::ClusterBarrier q_free;
    cutlass::arch::ClusterTransactionBarrier k_full[kStages];
    cutlass::arch::ClusterBarrier k_free[kStages];
    cutlass::arch::ClusterTransactionBarrier v_full[kStages];
    cutlass::arch::ClusterBarrier v_free[kStages];
    cutlass::arch::ClusterBarrier tile_full[2];
    cutlass::arch::ClusterBarrier tile_free[2];
    int tile[2];             // index of a tile, or -1: no more
    int trips[2];            // kept key blocks of that tile
    int key_block[kStages];  // which key block lies in a K stage
  };
  static constexpr int kSmemBytes = static_cast<int>(sizeof(SharedStorage)) + 1024;
};

}  // namespace prism::sm90
