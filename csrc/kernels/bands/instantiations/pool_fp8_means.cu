#include "kernels/bands/pool_blocks.cuh"

PRISM_INSTANTIATE_POOL(prism::Fp8Code, prism::PoolMode::kMeans);
