// Tiles, layouts and the shared-memory plan of the portable attention kernel.
#pragma once

#include <cutlass/numeric_types.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include <cstdint>
#include <type_traits>

namespace prism::sm80 {

// Four warps share kTileM query rows of one query block and walk the kept keys kTileN at a time: at
// head_dim 128 the output and score accumulators of two 16-row fragments a warp just fit into 255
// registers. kTileM is the query block size, or half of it at head_dim 256.
//
// kFp8: K and V come as float8 e4m3. They are staged a tile ahead and converted into one 16-bit
// tile each, which takes as much memory as the three 16-bit tiles otherwise.
template <typename Element_, int kHeadDim_, int kTileM_, bool kFp8_ = false>
struct AttentionConfig {
  using Element = Element_;
  using ElementKV = std::conditional_t<kFp8_, uint8_t, Element>;  // in global memory
  static constexpr bool kFp8 = kFp8_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kHeadDim == 256 ? 32 : 64;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  // K is loaded one tile ahead; V has QK^T and the softmax of its own tile to arrive. A second V
  // stage would leave an A100 with one CTA a multiprocessor.
  static constexpr int kStagesK = kFp8 ? 1 : 2;
  static constexpr int kMinBlocks = kHeadDim == 64 && kTileM == 64 ? 3 : 2;

  static constexpr bool kIsHalf = std::is_same_v<Element, cutlass::half_t>;
  using MmaAtom = std::conditional_t<kIsHalf, cute::SM80_16x8x16_F32F16F16F32_TN,
                                     cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  using TiledMma = cute::TiledMMA<cute::MMA_Atom<MmaAtom>,
                                  cute::Layout<cute::Shape<cute::Int<kWarps>, cute::_1, cute::_1>>,
                                  cute::Tile<cute::Int<16 * kWarps>, cute::_16, cute::_16>>;

  // Rows of 64 elements (128 bytes), their 16-byte chunks XORed by row: free of bank conflicts
  // for cp.async, ldmatrix and the output's stores.
  using SmemAtom = decltype(cute::composition(
      cute::Swizzle<3, 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::_64>, cute::Stride<cute::_64, cute::_1>>{}));
  template <int kRows>
  using SmemRows = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>>{}));
  using SmemLayoutQ = SmemRows<kTileM>;  // also the output tile's
  using SmemLayoutKV = SmemRows<kTileN>;
  using SmemLayoutVt = decltype(cute::composition(
      SmemLayoutKV{}, cute::make_layout(cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>>{},
                                        cute::GenRowMajor{})));

  static constexpr int kSizeQ = kTileM * kHeadDim;
  static constexpr int kSizeKV = kTileN * kHeadDim;
  static constexpr int kSmemBytes =
      (kSizeQ + (kStagesK + 1) * kSizeKV) * static_cast<int>(sizeof(Element)) +
      (kFp8 ? 2 * kSizeKV : 0);
};

}  // namespace prism::sm80
