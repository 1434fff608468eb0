#include <cstdint>

#include "kernels/select/launch_select.cuh"

namespace prism {

template cudaError_t select_bytes<64>(const SelectBlocksParams&, int64_t*);
template cudaError_t launch_select<64>(const SelectBlocksParams&, int, cudaStream_t);
template void describe_select<64>(std::vector<KernelInfo>&);

}  // namespace prism
