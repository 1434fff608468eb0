// Hopper block-sparse flash attention: TMA + wgmma, warp-specialised and persistent.
//
// CTAs stay and draw query tiles from a global counter. In each, a warp schedules tiles ahead
// (scheduler.cuh), two load them (loader.cuh) and two warpgroups compute them (consumer.cuh),
// through rings of shared-memory stages that run on across tiles. One more warpgroup converts fp8
// keys and values in between (converter.cuh).
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <string>

#include "kernels/attention/dispatch.h"
#include "kernels/attention/sm90/arguments.h"
#include "kernels/attention/sm90/config.h"
#include "kernels/attention/sm90/config_fp8.h"
#include "kernels/attention/sm90/consumer.cuh"
#include "kernels/attention/sm90/converter.cuh"
#include "kernels/attention/sm90/kernel.h"
#include "kernels/attention/sm90/loader.cuh"
#include "kernels/attention/sm90/scheduler.cuh"
#include "kernels/attention/sm90/tensor_map.h"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/describe.h"

namespace prism::sm90 {

enum class WarpgroupRole { kProducer = 0, kConsumer0 = 1, kConsumer1 = 2, kConverter = 3 };

// Warps that read every tile's descriptor and fill the stages, beside the consumers.
template <typename Config>
constexpr int converter_warps() {
  if constexpr (Config::kFp8) {
    return Config::kConverterWarps;
  } else {
    return 0;
  }
}

template <typename Config>
__device__ __forceinline__ void run_roles(const KernelArguments& arguments) {
  extern __shared__ __align__(1024) char smem[];
  auto& storage = *reinterpret_cast<typename Config::SharedStorage*>(smem);
  constexpr int kConverterWarps = converter_warps<Config>();
  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(&arguments.tma_q);
    prefetch_tma_descriptor(&arguments.tma_k);
    prefetch_tma_descriptor(&arguments.tma_v);
    prefetch_tma_descriptor(&arguments.tma_o);
    for (int i = 0; i < Config::kStagesQ; ++i) {
      storage.q_full[i].init(1);
      storage.q_free[i].init(Config::kOutputInQueries ? Config::kConsumers
                                                      : Config::kConsumerWarps);
    }
    for (int i = 0; i < Config::kStagesK; ++i) {
      storage.k_full[i].init(Config::kFp8 ? kConverterWarps : 1);
      storage.k_free[i].init(Config::kConsumerWarps);
    }
    for (int i = 0; i < Config::kStagesV; ++i) {
      storage.v_full[i].init(Config::kFp8 ? kConverterWarps : 1);
      storage.v_free[i].init(Config::kConsumerWarps);
    }
    for (int i = 0; i < Config::kStagesTile; ++i) {
      storage.tile_full[i].init(1);
      // And the loaders'.
      storage.tile_free[i].init(Config::kConsumerThreads + (2 + kConverterWarps) * 32);
    }
    if constexpr (Config::kFp8) {
      for (int i = 0; i < Config::kLoadStagesK; ++i) {
        storage.staging.k_full[i].init(1);
        storage.staging.k_free[i].init(kConverterWarps);
      }
      for (int i = 0; i < Config::kLoadStagesV; ++i) {
        storage.staging.v_full[i].init(1);
        storage.staging.v_free[i].init(kConverterWarps);
      }
    }
    cutlass::arch::fence_barrier_init();
  }
  wait_for_producer();  // of the mask, and of whatever the memory of the output held before
  __syncthreads();
  // Uniform in a warp, and the compiler is told so.
  const auto role =
      static_cast<WarpgroupRole>(__shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0));
  if (role == WarpgroupRole::kProducer) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0);
    if (warp == 0) {
      Loader<Config, Operand::kKeys>(arguments, storage).run();
    } else if (warp == 1) {
      Loader<Config, Operand::kValues>(arguments, storage).run();
    } else if (warp == 2) {
      Scheduler<Config>(arguments, storage).run();
    }
  } else if (Config::kFp8 && role == WarpgroupRole::kConverter) {
    if constexpr (Config::kFp8) {
      cutlass::arch::warpgroup_reg_dealloc<Config::kConverterRegisters>();
      Converter<Config>(storage).run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    const int warpgroup = static_cast<int>(role) - static_cast<int>(WarpgroupRole::kConsumer0);
    Consumer<Config>(arguments, storage, warpgroup).run();
  }
}

// Not forced inline: the order in which the compiler inlines decides whether registers spill.
template <typename Config>
__device__ void run_kernel(const KernelArguments& arguments) {
  run_roles<Config>(arguments);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sparse_attention_kernel(const __grid_constant__ KernelArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (Config::kScoreOptions) {
    run_roles<Config>(arguments);  // too large to be inlined by itself
  } else {
    run_kernel<Config>(arguments);
  }
#endif
}

// How coordinates become offsets in plain arrays.
inline void prepare_offsets(const SparseAttentionParams& params, KernelArguments& arguments) {
  const int64_t out_row = params.out.row_stride;
  if (params.ragged.is_ragged()) {
    const int64_t end = kSliceEnd;
    arguments.z = kSliceEnd;
    arguments.q_end = kSliceEnd;
    arguments.out = {out_row, out_row, params.out.head_stride, -end * out_row};
    arguments.lse = {1, 1, params.ragged.total_q, -end};
  } else {
    arguments.z = 0;
    arguments.q_end = params.q_len;
    arguments.out = {out_row, params.out.batch_stride, params.out.head_stride, 0};
    arguments.lse = {1, static_cast<int64_t>(params.q_heads) * params.q_len, params.q_len, 0};
  }
}

template <typename Config>
cudaError_t prepare(const SparseAttentionParams& params, int l2_bytes, KernelArguments& arguments) {
  arguments.params = params;
  arguments.q_blocks = (params.q_len + Config::kTileM - 1) / Config::kTileM;
  arguments.k_blocks = (params.k_len + params.k_block_size - 1) / params.k_block_size;
  const int64_t tiles = count_tiles(params, Config::kTileM);
  // The counter runs past the last tile by one a CTA.
  if (tiles > std::numeric_limits<int32_t>::max() - 4096) {
    return cudaErrorInvalidConfiguration;
  }
  arguments.tiles = static_cast<int>(tiles);
  const RaggedBatch& ragged = params.ragged;
  const int64_t kv_heads = params.kv_heads * (ragged.is_ragged() ? 1 : params.batch);
  arguments.kv_section =
      kv_section(params.k_len, params.head_dim, kv_heads, l2_bytes, kv_element_bytes(params));
  prepare_offsets(params, arguments);
  arguments.cap_factor = params.softcap > 0.f ? cap_factor(params.scale, params.softcap) : 0.f;
  arguments.copy_rows = Config::kBoxN;
  arguments.page_stride = 0;
  if (ragged.is_paged()) {
    arguments.copy_rows = std::min(Config::kBoxN, ragged.page_size());
    arguments.page_stride = static_cast<int>(page_rows(params.k));
  }
  const auto encode = [&](CUtensorMap& map, const TensorView& x, int rows, int heads, int box) {
    const MapShape shape{params.head_dim, rows, heads, params.batch, ragged.is_ragged()};
    return encode_tensor_map(map, x, params.dtype, shape, box);
  };
  const auto encode_kv = [&](CUtensorMap& map, const TensorView& x, int box) {
    const MapShape shape{params.head_dim, params.k_len, params.kv_heads, params.batch,
                         ragged.is_ragged()};
    return Config::kFp8
               ? encode_tensor_map(map, x, DType::kFloat8E4M3, shape, box, Config::kHeadDim)
               : encode_tensor_map(map, x, params.dtype, shape, box);
  };
  const int copy_rows = arguments.copy_rows;
  cudaError_t error =
      encode(arguments.tma_q, params.q, params.q_len, params.q_heads, Config::kTileM);
  if (error == cudaSuccess) {
    error = encode_kv(arguments.tma_k, params.k, copy_rows);
  }
  if (error == cudaSuccess) {
    error = encode_kv(arguments.tma_v, params.v, copy_rows);
  }
  if (error == cudaSuccess) {
    error = encode(arguments.tma_o, params.out, params.q_len, params.q_heads, 64);
  }
  return error;
}

struct DeviceTraits {
  int device;
  int multiprocessors;
  int l2_bytes;
};

// Of the current device; asked for once a thread and device.
inline cudaError_t current_device(DeviceTraits& traits) {
  thread_local DeviceTraits known{-1, 0, 0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device != known.device) {
    DeviceTraits found{device, 0, 0};
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&found.l2_bytes, cudaDevAttrL2CacheSize, device);
    }
    if (error == cudaSuccess) {
      known = found;
    }
  }
  traits = known;
  return error;
}

// Lets the kernel have its shared memory. The attribute belongs to the device.
template <typename Config>
cudaError_t allow_shared_memory(int device) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each of the first 64 devices
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) {
    return cudaSuccess;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(sparse_attention_kernel<Config>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSmemBytes);
  if (error == cudaSuccess) {
    allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  return error;
}

template <typename Config>
cudaError_t launch_config(const SparseAttentionParams& params, cudaStream_t stream) {
  DeviceTraits device;
  KernelArguments arguments;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) {
    error = prepare<Config>(params, device.l2_bytes, arguments);
  }
  if (error == cudaSuccess) {
    error = allow_shared_memory<Config>(device.device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int grid = std::min(device.multiprocessors, arguments.tiles);
  if (grid == arguments.tiles) {
    arguments.params.tile_counter = nullptr;  // every CTA has its one tile
  } else if (!params.tile_counter_is_zero) {
    error = cudaMemsetAsync(params.tile_counter, 0, sizeof(int32_t), stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  const LaunchShape shape{grid, Config::kThreads, Config::kSmemBytes, params.overlaps};
  return launch_kernel(sparse_attention_kernel<Config>, shape, stream, arguments);
}

template <typename Config>
void describe_config(std::vector<KernelInfo>& kernels) {
  const std::string dtype = Config::kIsHalf ? "fp16" : "bf16";
  const std::string head_dim = std::to_string(Config::kHeadDim);
  describe_kernel(
      kernels,
      "sparse_attention_sm90<" + dtype + (Config::kFp8 ? ", fp8" : "") + ", d" + head_dim + ", n" +
          std::to_string(Config::kBlockN) + (Config::kScoreOptions ? ", options>" : ">"),
      std::to_string(Config::kTileM) + " x " + std::to_string(Config::kTileN) + " x " + head_dim,
      sparse_attention_kernel<Config>, Config::kThreads, Config::kSmemBytes);
}

template <typename Element, int kHeadDim, int kBlockN, bool kScoreOptions>
cudaError_t launch_attention(const SparseAttentionParams& params, cudaStream_t stream) {
  return launch_config<AttentionConfig<Element, kHeadDim, kBlockN, kScoreOptions>>(params, stream);
}

template <typename Element, int kHeadDim, int kBlockN, bool kScoreOptions>
void describe_attention(std::vector<KernelInfo>& kernels) {
  describe_config<AttentionConfig<Element, kHeadDim, kBlockN, kScoreOptions>>(kernels);
}

template <typename Element, int kHeadDim, int kBlockN>
cudaError_t launch_attention_fp8(const SparseAttentionParams& params, cudaStream_t stream) {
  return launch_config<Fp8AttentionConfig<Element, kHeadDim, kBlockN>>(params, stream);
}

template <typename Element, int kHeadDim, int kBlockN>
void describe_attention_fp8(std::vector<KernelInfo>& kernels) {
  describe_config<Fp8AttentionConfig<Element, kHeadDim, kBlockN>>(kernels);
}

}  // namespace prism::sm90
