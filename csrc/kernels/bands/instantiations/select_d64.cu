#include <cstdint>

#include "kernels/bands/select_rows.cuh"

namespace prism {

template cudaError_t count_strip_rows<64>(const SelectParams&, int64_t*);
template cudaError_t launch_select_rows<64>(const BandsParams&, int, cudaStream_t);
template void describe_select_rows<64>(std::vector<KernelInfo>&);

}  // namespace prism
