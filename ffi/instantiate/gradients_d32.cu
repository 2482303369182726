#include "kernel/backward_sm90.cuh"

template cudaError_t jsparse::launch_gradients<JSPARSE_BFLOAT16, 32, false>(
    const BackwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_gradients<JSPARSE_BFLOAT16, 32, true>(
    const BackwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_gradients<JSPARSE_FLOAT16, 32, false>(
    const BackwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_gradients<JSPARSE_FLOAT16, 32, true>(
    const BackwardParams &, cudaStream_t);
