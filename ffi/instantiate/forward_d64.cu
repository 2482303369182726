#include "kernel/forward_sm90.cuh"

template cudaError_t jsparse::launch_forward<JSPARSE_BFLOAT16, 64, 0>(
    const ForwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_forward<JSPARSE_FLOAT16, 64, 0>(
    const ForwardParams &, cudaStream_t);
