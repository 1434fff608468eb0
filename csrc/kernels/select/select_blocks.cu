#include "kernels/select/select_blocks.h"

#include <cstdint>

#include "kernels/describe.h"
#include "kernels/select/launch_select.h"

namespace prism {

cudaError_t select_workspace_bytes(const SelectBlocksParams& params, int64_t* bytes) {
  switch (estimation_width(params.head_dim)) {
    case 64:
      return select_bytes<64>(params, bytes);
    case 128:
      return select_bytes<128>(params, bytes);
    default:
      return select_bytes<256>(params, bytes);
  }
}

cudaError_t launch_select_blocks(const SelectBlocksParams& params, int sm, cudaStream_t stream) {
  if (params.batch == 0 || params.q_heads == 0 || params.q_blocks == 0) {
    return cudaSuccess;
  }
  if (params.k_blocks > kMaxSelectKeyBlocks) {
    return cudaErrorInvalidValue;
  }
  if (params.q_heads / params.kv_heads * params.q_blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  switch (estimation_width(params.head_dim)) {
    case 64:
      return launch_select<64>(params, sm, stream);
    case 128:
      return launch_select<128>(params, sm, stream);
    default:
      return launch_select<256>(params, sm, stream);
  }
}

void describe_select_blocks(std::vector<KernelInfo>& kernels) {
  describe_select<64>(kernels);
  describe_select<128>(kernels);
  describe_select<256>(kernels);
}

}  // namespace prism
