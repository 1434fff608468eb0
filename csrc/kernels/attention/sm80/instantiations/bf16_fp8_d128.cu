#include "kernels/attention/sm80/kernel.cuh"

PRISM_INSTANTIATE_SM80(cutlass::bfloat16_t, 128, 128, true);
PRISM_INSTANTIATE_SM80(cutlass::bfloat16_t, 128, 64, true);
