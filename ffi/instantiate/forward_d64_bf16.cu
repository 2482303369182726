#include "kernel/forward_sm90.cuh"

template cudaError_t jsparse::launch_forward<JSPARSE_BFLOAT16, 64, false>(
    const ForwardParams &, cudaStream_t);
