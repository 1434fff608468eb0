#include "kernels/bands/pool_blocks.cuh"

PRISM_INSTANTIATE_POOL(__half, prism::PoolMode::kMeans);
