// What the compiled kernels cost, for profiling.
#pragma once

#include <string>
#include <vector>

namespace prism {

struct KernelInfo {
  std::string name;
  std::string tile;  // query rows x key rows x head_dim, or what one CTA handles
  int threads = 0;
  int registers = 0;
  int static_smem = 0;   // bytes
  int dynamic_smem = 0;  // bytes
  int local_bytes = 0;   // spilled or stack bytes a thread
  int blocks_per_sm = 0;
  int ptx_version = 0;
  int binary_version = 0;
  std::string error;  // why the runtime could not answer, or empty
};

// Every kernel of the library, as the runtime sees it on the current device.
std::vector<KernelInfo> list_kernels();

}  // namespace prism
