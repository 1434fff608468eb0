// Hopper block-sparse flash attention: TMA + wgmma, warp-specialised and persistent.
//
// The producer warp draws tiles from a global counter, walks their kept key blocks and keeps the K
// and V stages full across tile boundaries. The two consumer warpgroups own 64 query rows each;
// within one, Q K^T of the next block overlaps the softmax of this one, and between the two a
// pair of named barriers lets one compute its softmax while the other has the tensor cores.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_conversion.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "kernels/attention/block_iterator.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/sm90/kernel.h"
#include "kernels/attention/softmax.cuh"
#include "kernels/attention/tile_coord.h"
#include "kernels/describe.h"

namespace prism::sm90 {

using namespace cute;

enum class WarpgroupRole { kProducer = 0, kConsumer0 = 1, kConsumer1 = 2 };

// Position in a ring of stages whose barriers flip phase once a round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <typename Config>
struct KernelArguments {
  SparseAttentionParams params;
  typename Config::TmaQ tma_q;
  typename Config::TmaK tma_k;
  typename Config::TmaVt tma_v;
  int q_blocks;
  int k_blocks;
  int tiles;
};

template <typename Config>
struct Producer {
  using Storage = typename Config::SharedStorage;
  const KernelArguments<Config>& arguments;
  Storage& storage;

  // Kept key blocks below `block_end` of a mask row; the whole warp counts.
  __device__ static int count_blocks(const uint32_t* row, int block_end) {
    int count = 0;
    for (int word = threadIdx.x % 32; word * 32 < block_end; word += 32) {
      const int left = block_end - word * 32;
      const uint32_t visible = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
      count += __popc(row[word] & visible);
    }
    return __reduce_add_sync(0xffffffffu, count);
  }

  // One warp runs this; lane 0 issues the copies.
  __device__ void run() {
    constexpr int kTileN = Config::kTileN;
    constexpr int kHeadDim = Config::kHeadDim;
    const SparseAttentionParams& params = arguments.params;
    const bool leader = threadIdx.x == 0;

    const auto mQ = arguments.tma_q.get_tma_tensor(
        make_shape(params.q_len, Int<kHeadDim>{}, params.q_heads, static_cast<int>(params.batch)));
    const auto mK = arguments.tma_k.get_tma_tensor(
        make_shape(params.k_len, Int<kHeadDim>{}, params.kv_heads, static_cast<int>(params.batch)));
    const auto mVt = arguments.tma_v.get_tma_tensor(
        make_shape(Int<kHeadDim>{}, params.k_len, params.kv_heads, static_cast<int>(params.batch)));
    auto sQ = make_tensor(make_smem_ptr(storage.q.data()), typename Config::SmemLayoutQ{});
    auto sK = make_tensor(make_smem_ptr(storage.k.data()), typename Config::SmemLayoutK{});
    auto sVt = make_tensor(make_smem_ptr(storage.v.data()), typename Config::SmemLayoutVt{});

    Ring<2> tile_ring;
    Ring<1> q_ring;
    Ring<Config::kStages> ring;
    for (;;) {
      int index = 0;
      if (leader) {
        index = atomicAdd(params.tile_counter, 1);
      }
      index = __shfl_sync(0xffffffffu, index, 0);
      const bool done = index >= arguments.tiles;
      const TileCoord tile(params, done ? 0 : index, arguments.q_blocks);
      const TileRows rows(params, tile.q_block, Config::kTileM);
      const int block_end = (rows.k_end + kTileN - 1) / kTileN;
      const uint32_t* mask_row =
          params.bits +
          ((tile.batch * params.q_heads + tile.q_head) * arguments.q_blocks + tile.q_block) *
              ((arguments.k_blocks + 31) / 32);
      const int trips = done ? 0 : count_blocks(mask_row, block_end);

      storage.tile_free[tile_ring.stage].wait(tile_ring.phase ^ 1);
      if (leader) {
        storage.tile[tile_ring.stage] = done ? -1 : index;
        storage.trips[tile_ring.stage] = trips;
        storage.tile_full[tile_ring.stage].arrive();
      }
      tile_ring.advance();
      if (done) {
        return;
      }
      if (trips == 0 || !leader) {
        continue;
      }

      const int batch = static_cast<int>(tile.batch);
      const auto gQ =
          local_tile(mQ(_, _, tile.q_head, batch), Shape<Int<Config::kTileM>, Int<kHeadDim>>{},
                     make_coord(tile.q_block, _0{}));
      const auto gK = local_tile(mK(_, _, tile.kv_head, batch), Shape<Int<kTileN>, Int<kHeadDim>>{},
                                 make_coord(_, _0{}));
      const auto gVt = local_tile(mVt(_, _, tile.kv_head, batch),
                                  Shape<Int<kHeadDim>, Int<kTileN>>{}, make_coord(_0{}, _));
      auto [tQgQ, tQsQ] = tma_partition(arguments.tma_q, _0{}, Layout<_1>{}, group_modes<0, 2>(sQ),
                                        group_modes<0, 2>(gQ));
      auto [tKgK, tKsK] = tma_partition(arguments.tma_k, _0{}, Layout<_1>{}, group_modes<0, 2>(sK),
                                        group_modes<0, 2>(gK));
      auto [tVgV, tVsV] = tma_partition(arguments.tma_v, _0{}, Layout<_1>{}, group_modes<0, 2>(sVt),
                                        group_modes<0, 2>(gVt));

      BlockIterator kept(mask_row, 1, block_end);
      bool first = true;
      for (int block = kept.next(); block >= 0; block = kept.next()) {
        storage.k_free[ring.stage].wait(ring.phase ^ 1);
        storage.key_block[ring.stage] = block;
        storage.k_full[ring.stage].arrive_and_expect_tx(Config::kBytesKV);
        copy(arguments.tma_k.with(barrier(storage.k_full[ring.stage]), 0,
                                  TMA::CacheHintSm90::EVICT_LAST),
             tKgK(_, block), tKsK(_, ring.stage));
        if (first) {
          storage.q_free.wait(q_ring.phase ^ 1);
          storage.q_full.arrive_and_expect_tx(Config::kBytesQ);
          copy(arguments.tma_q.with(barrier(storage.q_full), 0, TMA::CacheHintSm90::EVICT_FIRST),
               tQgQ, tQsQ);
          q_ring.advance();
          first = false;
        }
        storage.v_free[ring.stage].wait(ring.phase ^ 1);
        storage.v_full[ring.stage].arrive_and_expect_tx(Config::kBytesKV);
        copy(arguments.tma_v.with(barrier(storage.v_full[ring.stage]), 0,
                                  TMA::CacheHintSm90::EVICT_LAST),
             tVgV(_, block), tVsV(_, ring.stage));
        ring.advance();
      }
    }
  }

  __device__ static uint64_t& barrier(cutlass::arch::ClusterTransactionBarrier& b) {
    return *reinterpret_cast<uint64_t*>(&b);
  }
};

// Issues A * B into C without waiting for it.
template <bool kZero, typename Mma, typename A, typename B, typename C>
__device__ void issue_gemm(Mma& mma, A const& a, B const& b, C& c) {
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  mma.accumulate_ = kZero ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
  for (int i = 0; i < size<2>(a); ++i) {
    gemm(mma, a(_, _, i), b(_, _, i), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

template <typename Config>
struct Consumer {
  using Element = typename Config::Element;
  using Storage = typename Config::SharedStorage;
  static constexpr int kRows = 2;  // rows of one thread: lane / 4 and 8 below
  const SparseAttentionParams& params;
  const KernelArguments<Config>& arguments;
  Storage& storage;
  int warpgroup;  // 0 or 1
  int thread;     // within the consumers

  __device__ void turn_wait() const {
    cutlass::arch::NamedBarrier::sync(Config::kConsumerThreads, 1 + warpgroup);
  }
  __device__ void turn_pass() const {
    cutlass::arch::NamedBarrier::arrive(Config::kConsumerThreads, 1 + (warpgroup ^ 1));
  }
  template <typename Barrier>
  __device__ void release(Barrier& free) const {
    __syncwarp();  // the arriving lane speaks for what all lanes have read
    if (thread % 32 == 0) {
      free.arrive();
    }
  }

  template <typename Scores>
  __device__ void apply_mask(Scores& scores, const TileRows& rows, int block) const {
    const int first_key = block * Config::kTileN;
    if (!rows.needs_mask(params, first_key, Config::kTileN)) {
      return;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int last_key = rows.last_key(params, row_in_tile(row));
#pragma unroll
      for (int column = 0; column < size<1>(scores); ++column) {
        const int key = first_key + column / 2 * 8 + thread % 4 * 2 + column % 2;
        if (key > last_key) {
          scores(row, column) = -INFINITY;
        }
      }
    }
  }

  __device__ int row_in_tile(int row) const { return thread / 32 * 16 + thread % 32 / 4 + row * 8; }

  __device__ void run() {
    typename Config::TiledMmaQK mma_qk;
    typename Config::TiledMmaPV mma_pv;
    auto sQ = make_tensor(make_smem_ptr(storage.q.data()), typename Config::SmemLayoutQ{});
    auto sK = make_tensor(make_smem_ptr(storage.k.data()), typename Config::SmemLayoutK{});
    auto sVt = make_tensor(make_smem_ptr(storage.v.data()), typename Config::SmemLayoutVt{});
    const auto thr_qk = mma_qk.get_thread_slice(thread);
    const auto thr_pv = mma_pv.get_thread_slice(thread);
    const auto tSrQ = thr_qk.partition_fragment_A(sQ);
    const auto tSrK = thr_qk.partition_fragment_B(sK);
    const auto tOrV = thr_pv.partition_fragment_B(sVt);

    if (warpgroup == 1) {
      turn_pass();  // the first turn is warpgroup 0's
    }
    Ring<2> tile_ring;
    Ring<1> q_ring;
    Ring<Config::kStages> k_ring;
    Ring<Config::kStages> v_ring;
    for (;;) {
      storage.tile_full[tile_ring.stage].wait(tile_ring.phase);
      const int index = storage.tile[tile_ring.stage];
      const int trips = storage.trips[tile_ring.stage];
      release(storage.tile_free[tile_ring.stage]);
      tile_ring.advance();
      if (index < 0) {
        return;
      }
      const TileCoord tile(params, index, arguments.q_blocks);
      const TileRows rows(params, tile.q_block, Config::kTileM);

      auto rO = partition_fragment_C(mma_pv, Shape<Int<Config::kTileM>, Int<Config::kHeadDim>>{});
      auto rO_rows = make_tensor(rO.data(), wgmma_rows_and_columns(rO.layout()));
      OnlineSoftmax<kRows> softmax(params.scale);
      if (trips == 0) {
        clear(rO);
        store(rO_rows, softmax, tile, rows);
        continue;
      }

      auto rS = partition_fragment_C(mma_qk, Shape<Int<Config::kTileM>, Int<Config::kTileN>>{});
      auto rS_rows = make_tensor(rS.data(), wgmma_rows_and_columns(rS.layout()));
      auto rP_acc = make_fragment_like<Element>(rS);
      auto rP = make_tensor(rP_acc.data(), wgmma_a_operand(rS.layout()));
      float correction[kRows];

      storage.q_full.wait(q_ring.phase);
      q_ring.advance();
      storage.k_full[k_ring.stage].wait(k_ring.phase);
      int block = storage.key_block[k_ring.stage];
      turn_wait();
      issue_gemm<true>(mma_qk, tSrQ, tSrK(_, _, _, k_ring.stage), rS);
      turn_pass();
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
      release(storage.k_free[k_ring.stage]);
      k_ring.advance();
      if (trips == 1) {
        release(storage.q_free);
      }
      apply_mask(rS_rows, rows, block);
      softmax.update(rS_rows, correction);
      convert(rS, rP_acc);

      bool first = true;
      for (int trip = 1; trip < trips; ++trip) {
        storage.k_full[k_ring.stage].wait(k_ring.phase);
        block = storage.key_block[k_ring.stage];
        turn_wait();
        issue_gemm<true>(mma_qk, tSrQ, tSrK(_, _, _, k_ring.stage), rS);
        storage.v_full[v_ring.stage].wait(v_ring.phase);
        if (first) {
          issue_gemm<true>(mma_pv, rP, tOrV(_, _, _, v_ring.stage), rO);
          first = false;
        } else {
          issue_gemm<false>(mma_pv, rP, tOrV(_, _, _, v_ring.stage), rO);
        }
        turn_pass();
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release(storage.k_free[k_ring.stage]);
        k_ring.advance();
        if (trip == trips - 1) {
          release(storage.q_free);
        }
        apply_mask(rS_rows, rows, block);
        softmax.update(rS_rows, correction);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(storage.v_free[v_ring.stage]);
        v_ring.advance();
        softmax.rescale(rO_rows, correction);
        convert(rS, rP_acc);
      }
      storage.v_full[v_ring.stage].wait(v_ring.phase);
      if (first) {
        issue_gemm<true>(mma_pv, rP, tOrV(_, _, _, v_ring.stage), rO);
      } else {
        issue_gemm<false>(mma_pv, rP, tOrV(_, _, _, v_ring.stage), rO);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      release(storage.v_free[v_ring.stage]);
      v_ring.advance();
      store(rO_rows, softmax, tile, rows);
    }
  }

  template <typename Source, typename Target>
  __device__ static void convert(const Source& source, Target& target) {
    constexpr int kSize = decltype(size(source))::value;
    cutlass::NumericArrayConverter<Element, float, kSize> converter;
    *reinterpret_cast<cutlass::Array<Element, kSize>*>(target.data()) =
        converter(*reinterpret_cast<const cutlass::Array<float, kSize>*>(source.data()));
  }

  // Normalizes and writes a thread's two rows. Four neighbouring threads hold 8 adjacent elements
  // of a row twice over: they trade so that each writes 16 bytes.
  template <typename Output, typename Softmax>
  __device__ void store(Output& output, const Softmax& softmax, const TileCoord& tile,
                        const TileRows& rows) const {
    const int64_t head = tile.batch * params.q_heads + tile.q_head;
    Element* out = static_cast<Element*>(params.out.data) + tile.batch * params.out.batch_stride +
                   tile.q_head * params.out.head_stride;
    const int quad = thread % 4;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float lse = softmax.finish(output, row);
      const int tile_row = row_in_tile(row);
      const bool valid = tile_row < rows.valid;
      if (valid && quad == 0) {
        params.lse[head * params.q_len + rows.first + tile_row] = lse;
      }
      Element* out_row = out + (rows.first + tile_row) * params.out.row_stride;
      // Chunk c (8 columns) of every four goes to the thread with quad == c.
#pragma unroll
      for (int chunk = 0; chunk < Config::kHeadDim / 8; chunk += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          cutlass::NumericArrayConverter<Element, float, 2> converter;
          cutlass::Array<float, 2> pair;
          pair[0] = output(row, (chunk + i) * 2);
          pair[1] = output(row, (chunk + i) * 2 + 1);
          const cutlass::Array<Element, 2> converted = converter(pair);
          pairs[i] = *reinterpret_cast<const uint32_t*>(&converted);
        }
        const uint4 mine = transpose_quad(pairs, quad);
        if (valid) {
          *reinterpret_cast<uint4*>(out_row + (chunk + quad) * 8) = mine;
        }
      }
    }
  }

  // Thread q of a quad holds element q of four vectors and returns vector q.
  __device__ static uint4 transpose_quad(const uint32_t (&x)[4], int quad) {
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // In step i a thread sends what thread quad ^ i needs and receives from it.
      const int wanted = quad ^ i;
      const uint32_t low = wanted & 1 ? x[1] : x[0];
      const uint32_t high = wanted & 1 ? x[3] : x[2];
      y[i] = __shfl_xor_sync(0xffffffffu, wanted & 2 ? high : low, i);
    }
    // y[i] came from thread quad ^ i: put it at that place.
    const auto at = [&](int place) {
      const int i = place ^ quad;
      const uint32_t low = i & 1 ? y[1] : y[0];
      const uint32_t high = i & 1 ? y[3] : y[2];
      return i & 2 ? high : low;
    };
    return make_uint4(at(0), at(1), at(2), at(3));
  }
};

template <typename Config>
__device__ void run_kernel(const KernelArguments<Config>& arguments) {
  extern __shared__ char smem[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(
      (reinterpret_cast<uintptr_t>(smem) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(arguments.tma_q.get_tma_descriptor());
    prefetch_tma_descriptor(arguments.tma_k.get_tma_descriptor());
    prefetch_tma_descriptor(arguments.tma_v.get_tma_descriptor());
    storage.q_full.init(1);
    storage.q_free.init(Config::kConsumerWarps);
    for (int i = 0; i < Config::kStages; ++i) {
      storage.k_full[i].init(1);
      storage.v_full[i].init(1);
      storage.k_free[i].init(Config::kConsumerWarps);
      storage.v_free[i].init(Config::kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      storage.tile_full[i].init(1);
      storage.tile_free[i].init(Config::kConsumerWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const auto role =
      static_cast<WarpgroupRole>(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0));
  if (role == WarpgroupRole::kProducer) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (threadIdx.x < 32) {
      Producer<Config>{arguments, storage}.run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    Consumer<Config>{arguments.params, arguments, storage,
                     static_cast<int>(role) - static_cast<int>(WarpgroupRole::kConsumer0),
                     static_cast<int>(threadIdx.x) - 128}
        .run();
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sparse_attention_kernel(const __grid_constant__ KernelArguments<Config> arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_kernel<Config>(arguments);
#endif
}

template <typename Config>
cudaError_t prepare(const SparseAttentionParams& params, KernelArguments<Config>& arguments) {
  using Element = typename Config::Element;
  const auto rows_view = [&](const TensorView& x, int rows, int heads) {
    return make_tensor(
        make_gmem_ptr(static_cast<const Element*>(x.data)),
        typename Config::GmemShape{rows, {}, heads, static_cast<int>(params.batch)},
        typename Config::GmemStride{x.row_stride, {}, x.head_stride, x.batch_stride});
  };
  const auto vt =
      make_tensor(make_gmem_ptr(static_cast<const Element*>(params.v.data)),
                  typename Config::GmemShapeVt{
                      {}, params.k_len, params.kv_heads, static_cast<int>(params.batch)},
                  typename Config::GmemStrideVt{
                      {}, params.v.row_stride, params.v.head_stride, params.v.batch_stride});
  arguments.params = params;
  arguments.q_blocks = (params.q_len + Config::kTileM - 1) / Config::kTileM;
  arguments.k_blocks = (params.k_len + Config::kTileN - 1) / Config::kTileN;
  const int64_t tiles = params.batch * params.q_heads * static_cast<int64_t>(arguments.q_blocks);
  // The counter runs past the last tile by one a CTA.
  if (tiles > std::numeric_limits<int32_t>::max() - 4096) {
    return cudaErrorInvalidConfiguration;
  }
  arguments.tiles = static_cast<int>(tiles);
  arguments.tma_q = make_tma_copy(
      SM90_TMA_LOAD{}, rows_view(params.q, params.q_len, params.q_heads),
      typename Config::SmemLayoutQ{}, Shape<Int<Config::kTileM>, Int<Config::kHeadDim>>{}, _1{});
  arguments.tma_k =
      make_tma_copy(SM90_TMA_LOAD{}, rows_view(params.k, params.k_len, params.kv_heads),
                    take<0, 2>(typename Config::SmemLayoutK{}),
                    Shape<Int<Config::kTileN>, Int<Config::kHeadDim>>{}, _1{});
  arguments.tma_v = make_tma_copy(SM90_TMA_LOAD{}, vt, take<0, 2>(typename Config::SmemLayoutVt{}),
                                  Shape<Int<Config::kHeadDim>, Int<Config::kTileN>>{}, _1{});
  return cudaSuccess;
}

template <typename Element, int kHeadDim, int kTileN>
cudaError_t launch_attention(const SparseAttentionParams& params, cudaStream_t stream) {
  using Config = AttentionConfig<Element, kHeadDim, kTileN>;
  KernelArguments<Config> arguments;
  if (const cudaError_t error = prepare<Config>(params, arguments); error != cudaSuccess) {
    return error;
  }
  int device = 0;
  int multiprocessors = 0;
  const auto kernel = sparse_attention_kernel<Config>;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    // Set at every launch: the attribute belongs to the device, not to the process.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Config::kSmemBytes);
  }
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(params.tile_counter, 0, sizeof(int32_t), stream);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int grid = std::min(multiprocessors, arguments.tiles);
  kernel<<<grid, Config::kThreads, Config::kSmemBytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <typename Element, int kHeadDim, int kTileN>
void describe_attention(std::vector<KernelInfo>& kernels) {
  using Config = AttentionConfig<Element, kHeadDim, kTileN>;
  const std::string dtype = Config::kIsHalf ? "fp16" : "bf16";
  describe_kernel(kernels,
                  "sparse_attention_sm90<" + dtype + ", d" + std::to_string(kHeadDim) + ", n" +
                      std::to_string(kTileN) + ">",
                  std::to_string(Config::kTileM) + " x " + std::to_string(kTileN) + " x " +
                      std::to_string(kHeadDim),
                  sparse_attention_kernel<Config>, Config::kThreads, Config::kSmemBytes);
}

}  // namespace prism::sm90
