// The consumers' main loop by halves of a key tile, for products that take no longer than the
// softmax.
#pragma once

#include <cstdint>

#include "kernels/attention/sm90/consumer.cuh"

namespace prism::sm90 {

// A key tile is worked off in halves. As soon as the probabilities of one half are there, its P V
// and then, into the registers of its scores, Q K^T of the same half of the next key tile follow,
// in one group of wgmma, across query tiles as well. Both have the softmax of the other half to
// end. So a warpgroup waits for the tensor cores only where they do not keep up, and the two
// warpgroups, each of which fills the gaps in the other's softmax, need no turns.
//
// ptxas does not follow what is in flight around a loop, and serialises wgmma where it would be. So
// the loop starts between the softmax of the first half and its products, with nothing in flight:
// those of the second half were issued before that softmax.
template <typename Config>
__device__ __forceinline__ void Consumer<Config>::run_by_halves() {
  static_assert(Config::kOutputInQueries && !Config::kTakeTurns && Config::kTileN == 128);
  constexpr int kHalfKeys = Config::kTileN / 2;
  constexpr int kHalfSteps = kHalfKeys / 16;  // of P V
  typename Config::TiledMmaHalf mma_qk;
  typename Config::TiledMmaPV mma_pv;
  auto sQ = make_tensor(make_smem_ptr(&storage.q[0][0][0]), typename Config::SmemLayoutQ{});
  auto sK = make_tensor(make_smem_ptr(&storage.k[0][0][0]), typename Config::SmemLayoutK{});
  auto sVt = make_tensor(make_smem_ptr(&storage.v[0][0][0]), typename Config::SmemLayoutVt{});
  const auto thr_qk = mma_qk.get_thread_slice(warpgroup * 128);
  const auto thr_pv = mma_pv.get_thread_slice(warpgroup * 128);
  auto tSrQ = [&]() {
    if constexpr (Config::kQueriesInRegisters) {
      return thr_qk.partition_fragment_A(sQ(_, _, 0));
    } else {
      return thr_qk.partition_fragment_A(sQ);
    }
  }();
  const auto tSrK = thr_qk.partition_fragment_B(sK);  // halves along its second mode
  const auto tOrV = thr_pv.partition_fragment_B(sVt);
  auto rO = partition_fragment_C(mma_pv, Shape<Int<Config::kTileM>, Int<Config::kHeadDim>>{});
  auto rO_rows = make_tensor(rO.data(), wgmma_rows_and_columns(rO.layout()));
  auto rS0 = partition_fragment_C(mma_qk, Shape<Int<Config::kTileM>, Int<kHalfKeys>>{});
  auto rS1 = make_fragment_like(rS0);
  auto rP0 = make_fragment_like<Element>(rS0);
  auto rP1 = make_fragment_like<Element>(rS0);
  float correction[kRows];
  Ring<Config::kStagesQ> q_ring;
  int trip = 0;
  int trips = 0;
  int masked = 0;

  const auto wait_for_queries = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    q_ring.count = static_cast<uint32_t>(tile().index);
    storage.q_full[q_ring.stage()].wait(q_ring.phase());
    if constexpr (Config::kQueriesInRegisters) {
      const auto load = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma_qk);
      const auto thr_load = load.get_thread_slice(thread());
      const auto source = as_position_independent_swizzle_tensor(sQ(_, _, q_ring.stage()));
      auto target = thr_load.retile_D(tSrQ);
      copy(load, thr_load.partition_S(source), target);
    }
  };
  const auto queries = [&](int i) CUTLASS_LAMBDA_FUNC_INLINE {
    if constexpr (Config::kQueriesInRegisters) {
      return tSrQ(_, 0, i);
    } else {
      return tSrQ(_, 0, i, q_ring.stage());
    }
  };
  const auto wait_for_keys = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    storage.k_full[key_ring().stage()].wait(key_ring().phase());
  };
  const auto wait_for_values = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    storage.v_full[value_ring().stage()].wait(value_ring().phase());
  };
  const auto release_keys = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    release(storage.k_free[key_ring().stage()]);
  };
  const auto multiply_queries = [&](auto& rS, int half) CUTLASS_LAMBDA_FUNC_INLINE {
    mma_qk.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int i = 0; i < size<2>(tSrK); ++i) {
      gemm(mma_qk, queries(i), tSrK(_, half, i, key_ring().stage()), rS(_, 0, 0));
      mma_qk.accumulate_ = GMMA::ScaleOut::One;
    }
  };
  const auto multiply_values = [&](auto& rP, int half) CUTLASS_LAMBDA_FUNC_INLINE {
    const auto tOrP = make_tensor(rP.data(), wgmma_a_operand(rS0.layout()));
    mma_pv.accumulate_ = half > 0 || trip > 0 ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
#pragma unroll
    for (int i = 0; i < kHalfSteps; ++i) {
      gemm(mma_pv, tOrP(_, _, i), tOrV(_, _, half * kHalfSteps + i, value_ring().stage()), rO);
      mma_pv.accumulate_ = GMMA::ScaleOut::One;
    }
  };
  // P V of one half, then the scores of the next key tile's.
  const auto issue = [&](auto& rS, auto& rP, int half) CUTLASS_LAMBDA_FUNC_INLINE {
    warpgroup_fence_operand(rS);
    warpgroup_fence_operand(rO);
    warpgroup_arrive();
    multiply_values(rP, half);
    multiply_queries(rS, half);
    warpgroup_commit_batch();
  };

  if (!find_tile()) {
    return;
  }
  OnlineSoftmax<kRows> softmax(score_scale());
  // Whether some row may not see some key of this key tile.
  const auto is_masked = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    if constexpr (Config::kScoreOptions) {
      return trip < masked || trip >= tile().window_trip;
    } else {
      return trip < masked;
    }
  };
  // From the scores of one half to its probabilities, and then on. What is in flight is of the
  // other half. Each branch goes on by itself: where they met, ptxas would lose track of that.
  const auto exponentiate = [&](const auto& rS, auto& rP, bool masks, const VisibleColumns& visible,
                                const auto& go_on) CUTLASS_LAMBDA_FUNC_INLINE {
    auto scores = make_fragment_like(rS);  // wgmma's registers are written to by wgmma only
    copy(rS, scores);
    apply_cap(scores);
    if (!masks && trip > 0 && softmax.template try_update<Element>(scores, rP)) {
      go_on();
    } else {
      auto rows = make_tensor(scores.data(), wgmma_rows_and_columns(scores.layout()));
      if (masks) {
        mask_columns<kHalfKeys / 4>(rows, 0, visible);
      }
      softmax.template update<true>(rows, correction);
      convert(scores, rP);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      softmax.rescale(rO_rows, correction);
      go_on();
    }
  };
  const auto begin_tile = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    trip = 0;
    trips = tile().trips;
    masked = masked_tiles();
    softmax.reset();
  };
  const auto exponentiate_first = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
    const bool masks = is_masked();
    VisibleColumns visible{};
    if (masks) {
      visible = visible_columns_of_half(trip, 0);
    }
    exponentiate(rS0, rP0, masks, visible, [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS1);
      warpgroup_fence_operand(rO);
    });
  };

  wait_for_queries();
  wait_for_keys();
  warpgroup_fence_operand(rS0);
  warpgroup_fence_operand(rS1);
  warpgroup_arrive();
  multiply_queries(rS0, 0);
  multiply_queries(rS1, 1);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rS0);
  warpgroup_fence_operand(rS1);
  release_keys();
  begin_tile();
  exponentiate_first();
  for (;;) {
    ++key_tile;  // the values are those of the key tile before
    if (trip == 0 && is_storer() && q_ring.count > 0) {
      tma_store_wait<0>();  // the store of the tile before has read its stage
      storage.q_free[(q_ring.count - 1) % Config::kStagesQ].arrive();
    }
    const bool masks = is_masked();
    VisibleColumns visible{};
    if (masks) {
      visible = visible_columns_of_half(trip, 1);
    }
    const bool last = trip + 1 == trips;
    bool more = true;
    TileDescriptor finished;
    if (last) {
      finished = tile();
      release_tile();
      more = find_tile();
      if (more) {
        wait_for_queries();
      }
    }
    if (more) {
      wait_for_keys();
    }
    wait_for_values();
    // After the last tile of all, this computes scores from whatever keys there are.
    issue(rS0, rP0, 0);
    exponentiate(rS1, rP1, masks, visible, [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      issue(rS1, rP1, 1);
      warpgroup_wait<1>();
      warpgroup_fence_operand(rS0);
    });
    if (last) {
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      store(rO_rows, softmax, finished);
      if (!more) {
        break;
      }
      if constexpr (Config::kFp8) {
        softmax.set_scale(score_scale());
      }
      begin_tile();
    } else {
      ++trip;
    }
    exponentiate_first();
    release_keys();
    release(storage.v_free[value_ring().stage()]);
  }
  if (is_storer()) {
    tma_store_wait<0>();  // the CTA's shared memory has to outlive the store
  }
}

}  // namespace prism::sm90
