#include "kernels/grid/select_grid.h"

#include <algorithm>
#include <cstdint>

#include "kernels/describe.h"
#include "kernels/grid/launch_grid.h"
#include "kernels/grid/workspace.h"

namespace prism {

namespace {

constexpr int64_t kCtasPerSm = 2;
constexpr int64_t kScratchBytes = int64_t{1} << 29;  // above this, a CTA an SM has to do

// CTAs that score at a time.
cudaError_t count_ctas(const GridParams& params, int64_t* ctas) {
  int device = 0;
  int sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const SelectParams& select = params.select;
  const int64_t units = select.q_heads / select.kv_heads * select.q_blocks;
  const int64_t cta_units = kCtaRows / (select.q_block_size / kCellTokens);
  const int64_t tiles = (units + cta_units - 1) / cta_units * select.batch * select.kv_heads;
  const int64_t cta_bytes = GridWorkspace(params, 0, select.ragged.is_ragged()).cta_floats() * 4;
  const bool large = cta_bytes * sms * kCtasPerSm > kScratchBytes;
  *ctas = std::min(tiles, sms * (large ? int64_t{1} : kCtasPerSm));
  return cudaSuccess;
}

}  // namespace

cudaError_t grid_workspace_bytes(const GridParams& params, int64_t* bytes) {
  int64_t ctas = 0;
  const cudaError_t error = count_ctas(params, &ctas);
  if (error == cudaSuccess) {
    *bytes = GridWorkspace(params, ctas, params.select.ragged.is_ragged()).bytes;
  }
  return error;
}

cudaError_t launch_pool_cells(const PoolCellsParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.heads == 0 || params.length == 0) {
    return cudaSuccess;
  }
  switch (estimation_width(params.head_dim)) {
    case 64:
      return launch_pool_cells<64>(params, stream);
    case 128:
      return launch_pool_cells<128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_select_grid(const GridParams& params, int sm, cudaStream_t stream) {
  const SelectParams& select = params.select;
  const int64_t units = select.q_heads / select.kv_heads * select.q_blocks;
  // Of a ragged batch tiles are counted over all sequences, and drawn in 32 bits.
  if (units > INT32_MAX || (select.ragged.is_ragged() &&
                            units / (kCtaRows * kCellTokens / select.q_block_size) + 2 >
                                INT32_MAX / std::max(select.batch * select.kv_heads, int64_t{1}))) {
    return cudaErrorInvalidConfiguration;
  }
  if (select.rules.per_head && select.q_heads > kMaxRuleHeads) {
    return cudaErrorInvalidValue;
  }
  int64_t ctas = 0;
  const cudaError_t error = count_ctas(params, &ctas);
  if (error != cudaSuccess || ctas == 0) {
    return error;
  }
  switch (estimation_width(params.select.head_dim)) {
    case 64:
      return launch_grid<64>(params, ctas, sm, stream);
    case 128:
      return launch_grid<128>(params, ctas, sm, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

void describe_grid(std::vector<KernelInfo>& kernels) {
  describe_grid<64>(kernels);
  describe_grid<128>(kernels);
}

}  // namespace prism
