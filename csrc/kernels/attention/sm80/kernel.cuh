// Portable block-sparse flash attention: cp.async + ldmatrix + mma.sync, for sm_80 and newer.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "kernels/attention/block_iterator.h"
#include "kernels/attention/dispatch.h"
#include "kernels/attention/sm80/config.h"
#include "kernels/attention/sm80/fp8_rows.cuh"
#include "kernels/attention/sm80/kernel.h"
#include "kernels/attention/softmax.cuh"
#include "kernels/attention/tile_finder.cuh"
#include "kernels/common/batch.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/describe.h"

namespace prism::sm80 {

using namespace cute;

constexpr int kVector = 8;        // elements of one 16-byte chunk
constexpr int kAtomColumns = 64;  // elements of one swizzled shared-memory row
constexpr int kRowThreads = kAtomColumns / kVector;

// Rows at a fixed distance; those at and above `valid` do not exist.
template <typename Element>
struct StridedRows {
  const Element* first;
  int64_t stride;
  int valid;

  __device__ bool find(int row, const Element*& address) const {
    address = first + (row < valid ? row * stride : 0);
    return row < valid;
  }
};

// Rows that lie in the pages of one sequence.
template <typename Element>
struct PagedRows {
  const Element* pool;  // of the head
  PagedTokens tokens;
  int first_key;
  int valid;

  __device__ bool find(int row, const Element*& address) const {
    address = row < valid ? tokens.find(pool, first_key + row) : nullptr;
    const bool exists = address != nullptr;
    address = exists ? address : pool;
    return exists;
  }
};

// A thread's share of the copies between kRows global rows and a swizzled shared tile: chunk
// `threadIdx.x % 8` of every 128-byte segment, of the rows threadIdx.x / 8 + i * kRowStep.
template <typename Config>
struct RowCopy {
  using Element = typename Config::Element;
  static constexpr int kRowStep = Config::kThreads / kRowThreads;

  // Rows that do not exist and columns from `columns` on become zeros and are not read.
  template <typename Rows, typename SmemTensor>
  __device__ static void load(const Rows& rows, int columns, bool aligned, SmemTensor& smem) {
    constexpr int kRows = decltype(size<0>(smem))::value;
    const int first_row = threadIdx.x / kRowThreads;
    const int first_column = threadIdx.x % kRowThreads * kVector;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kRows / kRowStep; ++i) {
        const int row = first_row + i * kRowStep;
        const Element* address;
        const bool exists = rows.find(row, address);
#pragma unroll
        for (int column = 0; column < Config::kHeadDim; column += kAtomColumns) {
          const bool valid = exists && first_column + column < columns;
          SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(
              *reinterpret_cast<const uint128_t*>(valid ? address + first_column + column
                                                        : address),
              *reinterpret_cast<uint128_t*>(&smem(row, first_column + column)), valid);
        }
      }
    } else {
#pragma unroll 1
      for (int row = first_row; row < kRows; row += kRowStep) {
        const Element* address;
        const bool exists = rows.find(row, address);
#pragma unroll 1
        for (int column = first_column; column < Config::kHeadDim; column += kAtomColumns) {
          const bool valid = exists && column < columns;
#pragma unroll 1
          for (int i = 0; i < kVector; ++i) {
            smem(row, column + i) = valid ? address[column + i] : Element(0.f);
          }
        }
      }
    }
  }

  template <typename SmemTensor>
  __device__ static void store(Element* target, int64_t row_stride, int rows_valid, int columns,
                               const SmemTensor& smem) {
    constexpr int kRows = decltype(size<0>(smem))::value;
    const int first_row = threadIdx.x / kRowThreads;
    const int first_column = threadIdx.x % kRowThreads * kVector;
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const int row = first_row + i * kRowStep;
      if (row < rows_valid) {
#pragma unroll
        for (int column = 0; column < Config::kHeadDim; column += kAtomColumns) {
          if (first_column + column < columns) {
            *reinterpret_cast<uint128_t*>(target + row * row_stride + first_column + column) =
                *reinterpret_cast<const uint128_t*>(&smem(row, first_column + column));
          }
        }
      }
    }
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    sparse_attention_kernel(const __grid_constant__ SparseAttentionParams params,
                            const bool aligned, const int section) {
  using Element = typename Config::Element;
  using ElementKV = typename Config::ElementKV;
  constexpr int kTileM = Config::kTileM;
  constexpr int kTileN = Config::kTileN;
  constexpr int kHeadDim = Config::kHeadDim;

  const RaggedBatch& ragged = params.ragged;
  const int q_blocks = (params.q_len + params.q_block_size - 1) / params.q_block_size;
  const int k_blocks = (params.k_len + params.k_block_size - 1) / params.k_block_size;
  Tile tile;
  if (!TileFinder<kTileM>(params, section).find(static_cast<int>(blockIdx.x), tile)) {
    return;
  }
  const Sequence& sequence = tile.sequence;
  const TileRows rows(sequence.q_len, sequence.k_len, params.causal, tile.q_block, kTileM);

  const int64_t q_row = sequence.q_start + rows.first;
  const Element* q = static_cast<const Element*>(params.q.data) +
                     sequence.batch * params.q.batch_stride + tile.q_head * params.q.head_stride +
                     q_row * params.q.row_stride;
  const auto first_key_of_head = [&](const TensorView& x) {
    const auto* head = static_cast<const ElementKV*>(x.data) + tile.kv_head * x.head_stride;
    return ragged.is_paged()
               ? head
               : head + sequence.batch * x.batch_stride + sequence.k_start * x.row_stride;
  };
  const ElementKV* k = first_key_of_head(params.k);
  const ElementKV* v = first_key_of_head(params.v);
  const int64_t head_index = static_cast<int64_t>(sequence.batch) * params.q_heads + tile.q_head;
  const uint32_t* mask_row =
      params.bits +
      (head_index * q_blocks + rows.first / params.q_block_size) * ((k_blocks + 31) / 32);
  BlockIterator kept(mask_row, params.k_block_size / kTileN, (rows.k_end + kTileN - 1) / kTileN);
  // Loads kTileN keys or values from key n * kTileN on, fp8 into the staging place.
  using KeyCopy = std::conditional_t<Config::kFp8, Fp8Rows<Config>, RowCopy<Config>>;
  const auto load_keys = [&](const TensorView& x, const ElementKV* base, int n, auto& target) {
    const int first_key = n * kTileN;
    const int valid = sequence.k_len - first_key;
    if (ragged.is_paged()) {
      const PagedTokens tokens(x, ragged, sequence.batch);
      KeyCopy::load(PagedRows<ElementKV>{base, tokens, first_key, valid}, params.head_dim, aligned,
                    target);
    } else {
      KeyCopy::load(StridedRows<ElementKV>{base + first_key * x.row_stride, x.row_stride, valid},
                    params.head_dim, aligned, target);
    }
  };

  extern __shared__ uint128_t smem[];
  Element* smem_q = reinterpret_cast<Element*>(smem);
  Element* smem_k = smem_q + Config::kSizeQ;
  Element* smem_v = smem_k + Config::kStagesK * Config::kSizeKV;
  // Of fp8 only.
  uint4* const staged_k = reinterpret_cast<uint4*>(smem_v + Config::kSizeKV);
  uint4* const staged_v = staged_k + Config::kSizeKV / Fp8Rows<Config>::kChunk;
  auto sQ = make_tensor(make_smem_ptr(smem_q), typename Config::SmemLayoutQ{});
  auto sV = make_tensor(make_smem_ptr(smem_v), typename Config::SmemLayoutKV{});
  auto sVt = make_tensor(make_smem_ptr(smem_v), typename Config::SmemLayoutVt{});

  typename Config::TiledMma tiled_mma;
  const auto thr_mma = tiled_mma.get_thread_slice(threadIdx.x);
  const auto copy_q = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, tiled_mma);
  const auto copy_k = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, tiled_mma);
  const auto copy_v = make_tiled_copy_B(Copy_Atom<SM75_U16x8_LDSM_T, Element>{}, tiled_mma);
  const auto thr_copy_q = copy_q.get_thread_slice(threadIdx.x);
  const auto thr_copy_k = copy_k.get_thread_slice(threadIdx.x);
  const auto thr_copy_v = copy_v.get_thread_slice(threadIdx.x);
  const auto tCsQ = thr_copy_q.partition_S(sQ);
  const auto tCsVt = thr_copy_v.partition_S(sVt);

  auto rO = partition_fragment_C(tiled_mma, Shape<Int<kTileM>, Int<kHeadDim>>{});
  clear(rO);
  auto rO_rows = make_tensor(rO.data(), as_rows_and_columns(rO.layout()));
  constexpr int kRows = decltype(size<0>(rO_rows))::value;
  float score_scale = params.scale;
  float value_scale = 1.f;
  if constexpr (Config::kFp8) {
    score_scale *= params.k_scale == nullptr ? 1.f : __ldg(params.k_scale + tile.kv_head);
    value_scale = params.v_scale == nullptr ? 1.f : __ldg(params.v_scale + tile.kv_head);
  }
  OnlineSoftmax<kRows> softmax(softmax_scale(score_scale, params.softcap));
  // Thread's first row within the tile; fragment row r adds 8 (r odd) and 64 (r / 2).
  const int thread_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const auto row_in_tile = [&](int row) {
    return thread_row + row % 2 * 8 + row / 2 * (16 * Config::kWarps);
  };

  // Keys before those that the window of the first row reaches are left out.
  const int first_tile = max(rows.first_key(params.window_left, 0), 0) / kTileN;
  const auto next_tile = [&]() {
    const int next = kept.next();
    return next < first_tile ? -1 : next;
  };
  int n = next_tile();
  if (n >= 0) {
    RowCopy<Config>::load(StridedRows<Element>{q, params.q.row_stride, rows.valid}, params.head_dim,
                          aligned, sQ);
    if constexpr (Config::kFp8) {
      load_keys(params.k, k, n, staged_k);
      cp_async_fence();
      load_keys(params.v, v, n, staged_v);
    } else {
      auto sK = make_tensor(make_smem_ptr(smem_k), typename Config::SmemLayoutKV{});
      load_keys(params.k, k, n, sK);
    }
    cp_async_fence();
  }

  int stage = 0;
  while (n >= 0) {
    const int n_next = next_tile();
    auto sK = make_tensor(make_smem_ptr(smem_k + stage * Config::kSizeKV),
                          typename Config::SmemLayoutKV{});
    if constexpr (Config::kFp8) {
      wait_for_copies<1>();
      KeyCopy::convert(staged_k, sK);
      if (n_next >= 0) {
        load_keys(params.k, k, n_next, staged_k);
      }
      cp_async_fence();
      __syncthreads();  // K of this tile is there; everyone is done with the previous tile
    } else {
      cp_async_wait<0>();
      __syncthreads();  // K of this tile is there; everyone is done with the previous tile
      load_keys(params.v, v, n, sV);
      cp_async_fence();
      if (n_next >= 0) {
        auto sK_next = make_tensor(make_smem_ptr(smem_k + (stage ^ 1) * Config::kSizeKV),
                                   typename Config::SmemLayoutKV{});
        load_keys(params.k, k, n_next, sK_next);
      }
      cp_async_fence();
    }

    // S = Q K^T
    auto rS = partition_fragment_C(tiled_mma, Shape<Int<kTileM>, Int<kTileN>>{});
    clear(rS);
    {
      auto rQ = thr_mma.partition_fragment_A(sQ);
      auto rK = thr_mma.partition_fragment_B(sK);
      auto rQ_copy = thr_copy_q.retile_D(rQ);
      auto rK_copy = thr_copy_k.retile_D(rK);
      const auto tCsK = thr_copy_k.partition_S(sK);
#pragma unroll
      for (int i = 0; i < size<2>(rQ); ++i) {
        copy(copy_q, tCsQ(_, _, i), rQ_copy(_, _, i));
        copy(copy_k, tCsK(_, _, i), rK_copy(_, _, i));
        gemm(tiled_mma, rQ(_, _, i), rK(_, _, i), rS);
      }
    }

    auto rS_rows = make_tensor(rS.data(), as_rows_and_columns(rS.layout()));
    if (params.softcap > 0.f) {
      cap_scores(rS, cap_factor(score_scale, params.softcap));
    }
    const int first_key = n * kTileN;
    if (rows.needs_mask(first_key, kTileN) || rows.needs_window(params.window_left, first_key)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int last_key = rows.last_key(row_in_tile(row));
        const int row_first_key = rows.first_key(params.window_left, row_in_tile(row));
#pragma unroll
        for (int column = 0; column < size<1>(rS_rows); ++column) {
          const int key = first_key + column / 2 * 8 + threadIdx.x % 4 * 2 + column % 2;
          if (key > last_key || key < row_first_key) {
            rS_rows(row, column) = -INFINITY;
          }
        }
      }
    }
    float correction[kRows];
    // Maxima settle after a few tiles: then the vote is cheaper than the multiplications.
    if (softmax.update<true>(rS_rows, correction)) {
      softmax.rescale(rO_rows, correction);
    }

    // O += P V
    auto rP_acc = make_fragment_like<Element>(rS);
    {
      cutlass::NumericArrayConverter<Element, float, decltype(size(rS))::value> convert;
      using Source = cutlass::Array<float, decltype(size(rS))::value>;
      using Target = cutlass::Array<Element, decltype(size(rS))::value>;
      *reinterpret_cast<Target*>(rP_acc.data()) =
          convert(*reinterpret_cast<const Source*>(rS.data()));
    }
    auto rP = make_tensor(rP_acc.data(), as_a_operand(rP_acc.layout()));
    if constexpr (Config::kFp8) {
      wait_for_copies<1>();
      KeyCopy::convert(staged_v, sV);
      if (n_next >= 0) {
        load_keys(params.v, v, n_next, staged_v);
      }
      cp_async_fence();
    } else {
      cp_async_wait<1>();
    }
    __syncthreads();  // V of this tile is there
    {
      auto rV = thr_mma.partition_fragment_B(sVt);
      auto rV_copy = thr_copy_v.retile_D(rV);
#pragma unroll
      for (int i = 0; i < size<2>(rP); ++i) {
        copy(copy_v, tCsVt(_, _, i), rV_copy(_, _, i));
        gemm(tiled_mma, rP(_, _, i), rV(_, _, i), rO);
      }
    }
    n = n_next;
    stage ^= Config::kStagesK - 1;
  }

  // Epilogue: through shared memory, where a warp reads and writes its own rows of Q only.
  float* lse = params.lse + (ragged.is_ragged() ? tile.q_head * int64_t{ragged.total_q} + q_row
                                                : head_index * params.q_len + rows.first);
  const float sink = params.sinks == nullptr ? -INFINITY : __ldg(params.sinks + tile.q_head);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float row_lse = softmax.finish(rO_rows, row, sink, value_scale);
    if (threadIdx.x % 4 == 0 && row_in_tile(row) < rows.valid) {
      lse[row_in_tile(row)] = row_lse;
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int column = 0; column < size<1>(rO_rows); column += 2) {
      cutlass::NumericArrayConverter<Element, float, 2> convert;
      cutlass::Array<float, 2> pair;
      pair[0] = rO_rows(row, column);
      pair[1] = rO_rows(row, column + 1);
      *reinterpret_cast<cutlass::Array<Element, 2>*>(
          &sQ(row_in_tile(row), column / 2 * 8 + threadIdx.x % 4 * 2)) = convert(pair);
    }
  }
  __syncthreads();
  Element* out = static_cast<Element*>(params.out.data) + sequence.batch * params.out.batch_stride +
                 tile.q_head * params.out.head_stride + q_row * params.out.row_stride;
  RowCopy<Config>::store(out, params.out.row_stride, rows.valid, params.head_dim, sQ);
}

template <typename Element, int kHeadDim, int kTileM, bool kFp8>
cudaError_t launch_attention(const SparseAttentionParams& params, cudaStream_t stream) {
  using Config = AttentionConfig<Element, kHeadDim, kTileM, kFp8>;
  const int64_t grid = count_tiles(params, kTileM);
  if (grid > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  const auto kernel = sparse_attention_kernel<Config>;
  int device = 0;
  int l2_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  }
  if (error == cudaSuccess) {
    // Set at every launch: the attribute belongs to the device, not to the process.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Config::kSmemBytes);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const bool aligned = moves_16_bytes(params);
  const int64_t kv_heads = params.kv_heads * (params.ragged.is_ragged() ? 1 : params.batch);
  const int section =
      kv_section(params.k_len, params.head_dim, kv_heads, l2_bytes, kv_element_bytes(params));
  kernel<<<static_cast<unsigned>(grid), Config::kThreads, Config::kSmemBytes, stream>>>(
      params, aligned, section);
  return cudaGetLastError();
}

template <typename Element, int kHeadDim, int kTileM, bool kFp8>
void describe_attention(std::vector<KernelInfo>& kernels) {
  using Config = AttentionConfig<Element, kHeadDim, kTileM, kFp8>;
  const std::string dtype = Config::kIsHalf ? "fp16" : "bf16";
  describe_kernel(kernels,
                  "sparse_attention_sm80<" + dtype + (kFp8 ? ", fp8" : "") + ", d" +
                      std::to_string(kHeadDim) + ", m" + std::to_string(kTileM) + ">",
                  std::to_string(kTileM) + " x " + std::to_string(Config::kTileN) + " x " +
                      std::to_string(kHeadDim),
                  sparse_attention_kernel<Config>, Config::kThreads, Config::kSmemBytes);
}

}  // namespace prism::sm80

// All that a file of instantiations/ holds.
#define PRISM_INSTANTIATE_SM80(...)                                \
  template cudaError_t prism::sm80::launch_attention<__VA_ARGS__>( \
      const prism::SparseAttentionParams&, cudaStream_t);          \
  template void prism::sm80::describe_attention<__VA_ARGS__>(std::vector<prism::KernelInfo>&)
