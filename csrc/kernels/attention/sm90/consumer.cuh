// The consumer warpgroups: 64 query rows each, S = Q K^T, softmax, O += P V.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_conversion.h>

#include <cstdint>

#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/softmax.cuh"

namespace prism::sm90 {

using namespace cute;

// Issues C = A * B, or C += A * B, without waiting for it.
template <typename Mma, typename A, typename B, typename C>
__device__ __forceinline__ void issue_gemm(Mma& mma, A const& a, B const& b, C& c,
                                           bool accumulate) {
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  mma.accumulate_ = accumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
#pragma unroll
  for (int i = 0; i < size<2>(a); ++i) {
    gemm(mma, a(_, _, i), b(_, _, i), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// Named barriers, each with one of either consumer warpgroup behind it. CUTLASS adds what it keeps
// to itself, among them that of __syncthreads.
enum Barrier : uint32_t {
  kTurnBarrier = 1,                      // the warpgroup may use the tensor cores
  kWarpgroupBarrier = kTurnBarrier + 2,  // all of its threads are there
};

// Q K^T of the next key tile is in flight while the softmax of this one is computed, across query
// tiles as well: the first Q K^T of a tile is issued with the last P V of the one before it.
// Between the two warpgroups a pair of named barriers lets one compute its softmax while the other
// has the tensor cores.
template <typename Config>
struct Consumer {
  using Element = typename Config::Element;
  using Storage = typename Config::SharedStorage;
  static constexpr int kRows = 2;  // rows of one thread: lane / 4 and 8 below

  const KernelArguments& arguments;
  const SparseAttentionParams& params;
  Storage& storage;
  int warpgroup;  // 0 or 1
  Ring<Config::kStagesTile> tile_ring;
  uint32_t key_tile = 0;  // whose scores come next; the values in use are those of the one before

  __device__ Consumer(const KernelArguments& arguments, Storage& storage, int warpgroup)
      : arguments(arguments), params(arguments.params), storage(storage), warpgroup(warpgroup) {}

  // Index within the consumers. Volatile, so that what depends on it is computed where it is needed
  // instead of staying in registers, which are scarce, through the main loop.
  __device__ static int thread() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x - 128;
  }
  __device__ static bool is_warp_leader() { return threadIdx.x % 32 == 0; }
  __device__ static bool is_storer() { return threadIdx.x % 128 == 0; }

  __device__ void turn_wait() const {
    if constexpr (Config::kTakeTurns) {
      cutlass::arch::NamedBarrier::sync(Config::kConsumerThreads, kTurnBarrier + warpgroup);
    }
  }
  __device__ void turn_pass() const {
    if constexpr (Config::kTakeTurns) {
      cutlass::arch::NamedBarrier::arrive(Config::kConsumerThreads, kTurnBarrier + (warpgroup ^ 1));
    }
  }
  // The consumers of one warpgroup only. The barrier's number is not worth a register either.
  __device__ void warpgroup_sync() const {
    cutlass::arch::NamedBarrier::sync(128, kWarpgroupBarrier + thread() / 128);
  }
  __device__ Ring<Config::kStagesK> key_ring() const { return {key_tile}; }
  __device__ Ring<Config::kStagesV> value_ring() const { return {key_tile - 1}; }

  // What wgmma has read is free once the warpgroup has waited for it.
  template <typename Barrier>
  __device__ void release(Barrier& free) const {
    if (is_warp_leader()) {
      free.arrive();
    }
  }

  // The first of a thread's two rows; the other is 8 below.
  __device__ static int row_in_tile(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

  // The tile at the head of the ring. It stays in shared memory until release_tile(): registers are
  // scarce.
  __device__ const typename Config::Descriptor& tile() const {
    return storage.tile[tile_ring.stage()];
  }

  // Its first key tiles, which have to be masked.
  __device__ int masked_tiles() const { return tile().template masked_tiles<Config::kBoxes>(); }

  __device__ void release_tile() {
    storage.tile_free[tile_ring.stage()].arrive();
    tile_ring.advance();
  }

  // Goes on to a tile that keeps any keys, writing those before it that keep none; false at the
  // end.
  __device__ bool find_tile() {
    for (;;) {
      storage.tile_full[tile_ring.stage()].wait(tile_ring.phase());
      if (tile().is_end()) {
        return false;
      }
      if (tile().trips > 0) {
        return true;
      }
      store_empty(tile());
      release_tile();
    }
  }

  // Before the mask, which a cap would bend.
  template <typename Scores>
  __device__ __forceinline__ void apply_cap(Scores& scores) const {
    if constexpr (Config::kScoreOptions) {
      if (arguments.cap_factor > 0.f) {
        cap_scores(scores, arguments.cap_factor);
      }
    }
  }

  template <typename Scores>
  __device__ __forceinline__ void apply_mask(Scores& scores, int trip) const {
    constexpr int kBoxColumns = decltype(size<1>(scores))::value / Config::kBoxes;
    const int thread = this->thread();
    int last_key[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      last_key[row] = tile().last_key(row_in_tile(thread) + row * 8) - thread % 4 * 2;
    }
#pragma unroll
    for (int box = 0; box < Config::kBoxes; ++box) {
      int first_key;
      if constexpr (Config::kScoreOptions) {
        first_key = tile().template first_key<Config>(trip * Config::kBoxes + box);
      } else {
        first_key = tile().template first_key<Config::kBoxN>(trip * Config::kBoxes + box);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int last_column = last_key[row] - first_key;
#pragma unroll
        for (int column = 0; column < kBoxColumns; ++column) {
          if (column / 2 * 8 + column % 2 > last_column) {
            scores(row, box * kBoxColumns + column) = -INFINITY;
          }
        }
        if constexpr (Config::kScoreOptions) {
          const int first_column =
              tile().first_visible(row_in_tile(thread) + row * 8) - thread % 4 * 2 - first_key;
#pragma unroll
          for (int column = 0; column < kBoxColumns; ++column) {
            if (column / 2 * 8 + column % 2 < first_column) {
              scores(row, box * kBoxColumns + column) = -INFINITY;
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    typename Config::TiledMmaQK mma_qk;
    typename Config::TiledMmaPV mma_pv;
    auto sQ = make_tensor(make_smem_ptr(&storage.q[0][0][0]), typename Config::SmemLayoutQ{});
    auto sK = make_tensor(make_smem_ptr(&storage.k[0][0][0]), typename Config::SmemLayoutK{});
    auto sVt = make_tensor(make_smem_ptr(&storage.v[0][0][0]), typename Config::SmemLayoutVt{});
    const auto thr_qk = mma_qk.get_thread_slice(warpgroup * 128);
    const auto thr_pv = mma_pv.get_thread_slice(warpgroup * 128);
    const auto tSrQ = thr_qk.partition_fragment_A(sQ);
    const auto tSrK = thr_qk.partition_fragment_B(sK);
    const auto tOrV = thr_pv.partition_fragment_B(sVt);
    auto rO = partition_fragment_C(mma_pv, Shape<Int<Config::kTileM>, Int<Config::kHeadDim>>{});
    auto rO_rows = make_tensor(rO.data(), wgmma_rows_and_columns(rO.layout()));
    auto rS = partition_fragment_C(mma_qk, Shape<Int<Config::kTileM>, Int<Config::kTileN>>{});
    auto rS_rows = make_tensor(rS.data(), wgmma_rows_and_columns(rS.layout()));
    // Two sets of probabilities: P V reads one while the softmax writes the other. Only the first
    // is used if they do not overlap.
    auto rP0 = make_fragment_like<Element>(rS);
    auto rP1 = make_fragment_like<Element>(rS);
    float correction[kRows];
    bool accumulate = false;  // whether rO holds anything of this tile
    Ring<Config::kStagesQ> q_ring;

    const auto wait_for_queries = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      q_ring.count = static_cast<uint32_t>(tile().index);
      storage.q_full[q_ring.stage()].wait(q_ring.phase());
    };
    const auto wait_for_keys = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      storage.k_full[key_ring().stage()].wait(key_ring().phase());
    };
    const auto wait_for_values = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      storage.v_full[value_ring().stage()].wait(value_ring().phase());
    };
    const auto issue_scores = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      issue_gemm(mma_qk, tSrQ(_, _, _, q_ring.stage()), tSrK(_, _, _, key_ring().stage()), rS,
                 false);
    };
    const auto issue_output = [&](auto& rP) CUTLASS_LAMBDA_FUNC_INLINE {
      const auto tOrP = make_tensor(rP.data(), wgmma_a_operand(rS.layout()));
      issue_gemm(mma_pv, tOrP, tOrV(_, _, _, value_ring().stage()), rO, accumulate);
      accumulate = true;
    };
    const auto release_keys = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      release(storage.k_free[key_ring().stage()]);
    };
    const auto release_values = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
      release(storage.v_free[value_ring().stage()]);
    };

    if (warpgroup == 1) {
      turn_pass();  // the first turn is warpgroup 0's
    }
    if (!find_tile()) {
      return;
    }
    OnlineSoftmax<kRows> softmax(score_scale());
    wait_for_queries();
    wait_for_keys();
    turn_wait();
    issue_scores();
    turn_pass();
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
    for (;;) {
      const int trips = tile().trips;
      const int masked = masked_tiles();
      release_keys();
      ++key_tile;
      softmax.reset();
      accumulate = false;
      apply_cap(rS);
      if (masked > 0) {
        apply_mask(rS_rows, 0);
      }
      softmax.template update<true>(rS_rows, correction);
      convert(rS, rP0);
      if constexpr (Config::kOutputInQueries) {
        // By now the store of the tile before has read its stage.
        if (is_storer() && q_ring.count > 0) {
          tma_store_wait<0>();
          storage.q_free[(q_ring.count - 1) % Config::kStagesQ].arrive();
        }
      }

      // Q K^T of the next key tile and P V of the last one; waits for the former.
      const auto issue_both = [&](auto& rP) CUTLASS_LAMBDA_FUNC_INLINE {
        wait_for_keys();
        wait_for_values();
        turn_wait();
        issue_scores();
        issue_output(rP);
        turn_pass();
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release_keys();
      };
      const auto finish_output = [&]() CUTLASS_LAMBDA_FUNC_INLINE {
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
      };
      const auto finish_masked_step = [&](int trip, auto& rP_next) CUTLASS_LAMBDA_FUNC_INLINE {
        apply_mask(rS_rows, trip);
        softmax.template update<true>(rS_rows, correction);
        finish_output();
        release_values();
        ++key_tile;
        softmax.rescale(rO_rows, correction);
        convert(rS, rP_next);
      };
      const auto masked_step = [&](int trip) CUTLASS_LAMBDA_FUNC_INLINE {
        issue_both(rP0);
        apply_cap(rS);
        finish_masked_step(trip, rP0);
      };
      const auto step = [&](int trip, auto& rP, auto& rP_next) CUTLASS_LAMBDA_FUNC_INLINE {
        issue_both(rP);
        apply_cap(rS);
        if constexpr (Config::kScoreOptions) {
          if (trip >= tile().window_trip) {
            finish_masked_step(trip, rP_next);
            return;
          }
        }
        // Each branch waits for P V by itself: a wait before the branch would let the compiler put
        // most of the softmax behind it.
        if (softmax.template try_update<Element>(rS, rP_next)) {
          finish_output();
        } else {
          softmax.template update<false>(rS_rows, correction);
          convert(rS, rP_next);
          finish_output();
          softmax.rescale(rO_rows, correction);
        }
        release_values();
        ++key_tile;
      };
      // The last P V of this tile, with the first Q K^T of the next; false after the last tile.
      const auto finish_tile = [&](auto& rP) CUTLASS_LAMBDA_FUNC_INLINE {
        if constexpr (!Config::kOutputInQueries) {
          release(storage.q_free[q_ring.stage()]);
        }
        const TileDescriptor finished = tile();
        release_tile();
        const bool more = find_tile();
        if (more) {
          if constexpr (Config::kFp8) {
            softmax.set_scale(score_scale());
          }
          wait_for_queries();
          wait_for_keys();
          wait_for_values();
          turn_wait();
          issue_scores();
          issue_output(rP);
          turn_pass();
          warpgroup_wait<0>();
          warpgroup_fence_operand(rS);
        } else {
          wait_for_values();
          turn_wait();
          issue_output(rP);
          turn_pass();
          warpgroup_wait<0>();
        }
        warpgroup_fence_operand(rO);
        release_values();
        store(rO_rows, softmax, finished);
        return more;
      };

      int trip = 1;
      // With options there is no register left to keep `masked` in.
      for (; trip < (Config::kScoreOptions ? masked_tiles() : masked); ++trip) {
        masked_step(trip);
      }
      bool more;
      for (;;) {
        if (trip++ == trips) {
          more = finish_tile(rP0);
          break;
        }
        if constexpr (Config::kOverlapsOutput) {
          step(trip - 1, rP0, rP1);
          if (trip++ == trips) {
            more = finish_tile(rP1);
            break;
          }
          step(trip - 1, rP1, rP0);
        } else {
          // With one set of probabilities the softmax begins after P V, while the other warpgroup
          // has its turn.
          issue_both(rP0);
          finish_output();
          release_values();
          ++key_tile;
          if (!softmax.template try_update<Element>(rS, rP0)) {
            softmax.template update<false>(rS_rows, correction);
            convert(rS, rP0);
            softmax.rescale(rO_rows, correction);
          }
        }
      }
      if (!more) {
        break;
      }
    }
    if (is_storer()) {
      tma_store_wait<0>();  // the CTA's shared memory has to outlive the store
    }
  }

  template <typename Source, typename Target>
  __device__ __forceinline__ static void convert(const Source& source, Target& target) {
    constexpr int kSize = decltype(size(source))::value;
    cutlass::NumericArrayConverter<Element, float, kSize> converter;
    *reinterpret_cast<cutlass::Array<Element, kSize>*>(target.data()) =
        converter(*reinterpret_cast<const cutlass::Array<float, kSize>*>(source.data()));
  }

  // Normalizes the output and stores it through shared memory: by TMA, which leaves out rows past
  // the end and goes on while the next tile is computed.
  template <typename Output, typename Softmax>
  __device__ __forceinline__ void store(Output& output, const Softmax& softmax,
                                        const TileDescriptor& tile) {
    const int thread = this->thread();
    const float sink = this->sink(tile);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float lse;
      if constexpr (Config::kFp8) {
        lse = softmax.finish(output, row, sink, value_scale(tile));
      } else {
        lse = softmax.finish(output, row, sink);
      }
      const int x = tile.q_x + row_in_tile(thread) + row * 8;
      if (thread % 4 == 0 && x < arguments.q_end) {
        params.lse[arguments.lse.at(x, tile.q_y, tile.q_head)] = lse;
      }
    }
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; panel += Config::kPanelsO) {
      if constexpr (!Config::kOutputInQueries) {
        if (is_storer()) {
          tma_store_wait<0>();  // the last store has read the panels
        }
      }
      warpgroup_sync();
#pragma unroll
      for (int i = 0; i < Config::kPanelsO; ++i) {
        write_panel(output, panel + i, thread, output_panel(tile, i));
      }
      tma_store_fence();
      warpgroup_sync();
      if (is_storer()) {
#pragma unroll
        for (int i = 0; i < Config::kPanelsO; ++i) {
          SM90_TMA_STORE_5D::copy(&arguments.tma_o, output_panel(tile, i), (panel + i) * 64,
                                  tile.q_x + warpgroup * 64, tile.q_head, tile.q_y, arguments.z);
        }
        tma_store_arrive();
      }
    }
  }

  // Where the warpgroup's rows of an output panel go: in place of its own queries, which nobody
  // else reads.
  __device__ Element* output_panel(const TileDescriptor& tile, int panel) const {
    if constexpr (Config::kOutputInQueries) {
      return &storage.q[tile.index % Config::kStagesQ][panel][warpgroup * Config::kPanelO];
    } else {
      return storage.output.panels[warpgroup][panel];
    }
  }

  // Columns [64 panel, 64 panel + 64) of the warpgroup's rows, in the 128-byte swizzle.
  template <typename Output>
  __device__ __forceinline__ static void write_panel(const Output& output, int panel, int thread,
                                                     Element* target) {
    // Lane i addresses row i % 8 of matrix i / 8; the matrices are (rows 0-7, rows 8-15) of eight
    // columns and then of the next eight.
    const int lane = thread % 32;
    const int row = thread % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = (panel * 8 + chunk + i / 2) * 2;
        cutlass::NumericArrayConverter<Element, float, 2> converter;
        cutlass::Array<float, 2> pair;
        pair[0] = output(i % 2, column);
        pair[1] = output(i % 2, column + 1);
        const cutlass::Array<Element, 2> converted = converter(pair);
        pairs[i] = *reinterpret_cast<const uint32_t*>(&converted);
      }
      const int swizzled = (chunk + lane / 16) ^ (row % 8);
      auto& address = *reinterpret_cast<uint128_t*>(target + row * 64 + swizzled * 8);
      SM90_U32x4_STSM_N::copy(pairs[0], pairs[1], pairs[2], pairs[3], address);
    }
  }

  // What the head adds to the softmax denominator, as a logit.
  __device__ float sink(const TileDescriptor& tile) const {
    return params.sinks == nullptr ? -INFINITY : __ldg(params.sinks + tile.q_head);
  }

  // The softmax scale; that of fp8 keys, which differs between heads, is folded into it.
  __device__ float score_scale() const {
    if constexpr (Config::kFp8) {
      if (params.k_scale != nullptr) {
        return params.scale * __ldg(params.k_scale + tile().kv_head);
      }
    }
    return Config::kScoreOptions ? softmax_scale(params.scale, params.softcap) : params.scale;
  }

  // What the output is multiplied by: the scale of fp8 values.
  __device__ float value_scale(const TileDescriptor& tile) const {
    return params.v_scale == nullptr ? 1.f : __ldg(params.v_scale + tile.kv_head);
  }

  // A tile without keys: output 0, and the log-sum-exp of the sink alone, -inf without one.
  __device__ void store_empty(const TileDescriptor& tile) const {
    constexpr int kVector = 8;
    constexpr int kVectors = Config::kHeadDim / kVector;
    const int column = thread() % kVectors * kVector;
#pragma unroll 1
    for (int row = thread() / kVectors; row < Config::kTileM;
         row += Config::kConsumerThreads / kVectors) {
      const int x = tile.q_x + row;
      if (x < arguments.q_end && column < params.head_dim) {
        auto* out = static_cast<Element*>(params.out.data) +
                    arguments.out.at(x, tile.q_y, tile.q_head) + column;
        *reinterpret_cast<uint4*>(out) = uint4{};
      }
    }
    const int x = tile.q_x + thread();
    if (thread() < Config::kTileM && x < arguments.q_end) {
      params.lse[arguments.lse.at(x, tile.q_y, tile.q_head)] = sink(tile);
    }
  }
};

}  // namespace prism::sm90
