#include "kernels/describe.h"

namespace prism {

std::vector<KernelInfo> list_kernels() {
  std::vector<KernelInfo> kernels;
  describe_bands(kernels);
  describe_grid(kernels);
  describe_keep_blocks(kernels);
  describe_sparse_attention(kernels);
  return kernels;
}

}  // namespace prism
