#include <cstdint>

#include "kernels/grid/launch_grid.cuh"

namespace prism {

template cudaError_t launch_grid<64>(const GridParams&, int64_t, int, cudaStream_t);
template cudaError_t launch_pool_cells<64>(const PoolCellsParams&, cudaStream_t);
template void describe_grid<64>(std::vector<KernelInfo>&);

}  // namespace prism
