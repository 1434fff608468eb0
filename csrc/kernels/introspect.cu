#include "kernels/describe.h"

namespace prism {

std::vector<KernelInfo> list_kernels() {
  std::vector<KernelInfo> kernels;
  describe_block_pool(kernels);
  describe_append_means(kernels);
  describe_prepare_means(kernels);
  describe_select_blocks(kernels);
  describe_estimate_grid(kernels);
  describe_sparse_attention(kernels);
  return kernels;
}

}  // namespace prism
