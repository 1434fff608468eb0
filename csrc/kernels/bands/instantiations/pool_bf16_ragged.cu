#include "kernels/bands/pool_blocks.cuh"

PRISM_INSTANTIATE_POOL(__nv_bfloat16, prism::PoolMode::kRagged);
