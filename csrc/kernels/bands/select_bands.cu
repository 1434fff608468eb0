#include "kernels/bands/select_bands.h"

#include <algorithm>
#include <cstdint>

#include "kernels/bands/pool_blocks.h"
#include "kernels/bands/prepare_keys.h"
#include "kernels/bands/select_rows.h"
#include "kernels/bands/workspace.h"
#include "kernels/common/load_rows.cuh"
#include "kernels/describe.h"

namespace prism {

namespace {

PoolTask make_task(const BandsParams& params, const BandsWorkspace& workspace, bool is_key) {
  const SelectParams& select = params.select;
  const int block_size = is_key ? select.k_block_size : select.q_block_size;
  const PoolShape shape = energy_shape(is_key ? select.k_len : select.q_len, block_size);
  // A shorter sequence may have more chunks.
  const int64_t ctas =
      select.ragged.is_ragged() ? std::min<int64_t>(shape.blocks, kMaxEnergyChunks) : shape.chunks;
  return {is_key ? params.k : params.q,
          is_key ? nullptr : workspace.q_means,
          is_key ? select.kv_heads : select.q_heads,
          ctas,
          shape,
          block_size,
          is_key,
          params.k_scale};
}

cudaError_t launch_tasks(const PoolArguments& arguments, DType dtype, cudaStream_t stream) {
  return launch_dtype<Elements>(dtype, [&](auto element) {
    using Element = decltype(element);
    return arguments.ragged.is_ragged()
               ? launch_pool<Element, PoolMode::kRagged>(arguments, stream)
               : launch_pool<Element, PoolMode::kEnergies>(arguments, stream);
  });
}

// Fills the workspace: in one launch, or in two where k has another dtype or was pooled before.
cudaError_t fill_workspace(const BandsParams& params, cudaStream_t stream) {
  const SelectParams& select = params.select;
  PoolArguments arguments = {};
  arguments.batch = select.batch;
  arguments.head_dim = select.head_dim;
  arguments.q_heads = select.q_heads;
  arguments.kv_heads = select.kv_heads;
  arguments.high = params.high;
  arguments.low = params.low;
  arguments.ragged = select.ragged;
  arguments.workspace = BandsWorkspace(select, /*strip_rows=*/0);
  const PoolTask queries = make_task(params, arguments.workspace, /*is_key=*/false);
  const PoolTask keys = make_task(params, arguments.workspace, /*is_key=*/true);
  const bool pooled = params.k_means.data != nullptr;
  const bool together = !pooled && !params.k_is_fp8;
  arguments.tasks[0] = queries;
  arguments.tasks[1] = together ? keys : PoolTask{};
  const cudaError_t error = launch_tasks(arguments, params.dtype, stream);
  if (error != cudaSuccess || together) {
    return error;
  }
  if (pooled) {
    return launch_prepare_keys(params, arguments.workspace, stream);
  }
  arguments.tasks[0] = keys;
  return launch_tasks(arguments, DType::kFloat8E4M3, stream);
}

}  // namespace

cudaError_t bands_workspace_bytes(const BandsParams& params, int64_t* bytes) {
  int64_t strip_rows = 0;
  const cudaError_t error = launch_width(params.select.head_dim, [&](auto width) {
    return count_strip_rows<width>(params.select, &strip_rows);
  });
  *bytes = BandsWorkspace(params.select, strip_rows).bytes;
  return error;
}

cudaError_t launch_select_bands(const BandsParams& params, int sm, cudaStream_t stream) {
  const SelectParams& select = params.select;
  if (select.batch == 0 || select.q_heads == 0 || select.q_blocks == 0) {
    return cudaSuccess;
  }
  if (select.k_blocks > kMaxSelectKeyBlocks ||
      (select.rules.per_head && select.q_heads > kMaxRuleHeads)) {
    return cudaErrorInvalidValue;
  }
  if (select.q_heads / select.kv_heads * select.q_blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  const cudaError_t error = fill_workspace(params, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_width(select.head_dim,
                      [&](auto width) { return launch_select_rows<width>(params, sm, stream); });
}

void describe_bands(std::vector<KernelInfo>& kernels) {
  Elements::for_each([&](auto element) {
    using Element = decltype(element);
    describe_pool<Element, PoolMode::kMeans>(kernels);
    describe_pool<Element, PoolMode::kEnergies>(kernels);
    describe_pool<Element, PoolMode::kRagged>(kernels);
  });
  describe_append_means(kernels);
  describe_prepare_keys(kernels);
  describe_select_rows<64>(kernels);
  describe_select_rows<128>(kernels);
  describe_select_rows<256>(kernels);
}

}  // namespace prism
