#include "kernel/backward_sm90.cuh"

template cudaError_t jsparse::launch_gradients<JSPARSE_BFLOAT16, 128, false>(
    const BackwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_gradients<JSPARSE_FLOAT16, 128, false>(
    const BackwardParams &, cudaStream_t);
