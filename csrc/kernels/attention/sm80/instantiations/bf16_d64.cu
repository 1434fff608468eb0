#include "kernels/attention/sm80/kernel.cuh"

PRISM_INSTANTIATE_SM80(cutlass::bfloat16_t, 64, 128);
PRISM_INSTANTIATE_SM80(cutlass::bfloat16_t, 64, 64);
