#include <cstdint>

#include "kernels/select/launch_select.cuh"

namespace prism {

template cudaError_t select_bytes<256>(const SelectBlocksParams&, int64_t*);
template cudaError_t launch_select<256>(const SelectBlocksParams&, int, cudaStream_t);
template void describe_select<256>(std::vector<KernelInfo>&);

}  // namespace prism
