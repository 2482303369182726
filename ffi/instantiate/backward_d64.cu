#include "kernel/backward_sm90.cuh"

template cudaError_t jsparse::launch_backward<JSPARSE_BFLOAT16, 64, false>(
    const BackwardParams &, bool, cudaStream_t);
template cudaError_t jsparse::launch_backward<JSPARSE_FLOAT16, 64, false>(
    const BackwardParams &, bool, cudaStream_t);
