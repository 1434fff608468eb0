// Pooling kernels by element and by what becomes of the means; instantiations/ compiles them in
// parallel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/bands/workspace.h"
#include "kernels/introspect.h"
#include "kernels/params.h"

namespace prism {

enum class PoolMode {
  kMeans,     // means alone
  kEnergies,  // also what selection needs, into its workspace
  kRagged,    // the same of a ragged batch
};

// The tokens of a head; a CTA takes `chunk` consecutive blocks of them.
struct PoolShape {
  int64_t length;
  int64_t blocks;
  int64_t chunk;
  int64_t chunks;  // of one head
};

__host__ __device__ inline PoolShape energy_shape(int64_t length, int block_size) {
  const int64_t blocks = (length + block_size - 1) / block_size;
  const EnergyChunks chunks(blocks);
  return {length, blocks, chunks.size, chunks.count};
}

// One tensor to pool.
struct PoolTask {
  TensorView x;
  float* means;  // (batch, heads, blocks, head_dim), contiguous; nullptr: not wanted
  int64_t heads;
  int64_t ctas;     // of one head
  PoolShape shape;  // of a ragged batch that of the longest sequence
  int block_size;
  bool is_key;
  const float* scale;  // of fp8 heads
};

struct PoolArguments {
  PoolTask tasks[2];
  int64_t batch;
  int head_dim;
  // What the kernels that fill a workspace read.
  int q_heads;
  int kv_heads;
  Band high;
  Band low;
  RaggedBatch ragged;
  BandsWorkspace workspace;
};

template <typename Element, PoolMode kMode>
cudaError_t launch_pool(const PoolArguments& arguments, cudaStream_t stream);

template <typename Element, PoolMode kMode>
void describe_pool(std::vector<KernelInfo>& kernels);

}  // namespace prism
