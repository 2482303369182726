#define JSPARSE_INLINE_STEPS __forceinline__
#include "kernel/forward_sm90.cuh"

template cudaError_t jsparse::launch_forward<JSPARSE_BFLOAT16, 128, 2>(
    const ForwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_forward<JSPARSE_BFLOAT16, 128, 4>(
    const ForwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_forward<JSPARSE_FLOAT16, 128, 2>(
    const ForwardParams &, cudaStream_t);
template cudaError_t jsparse::launch_forward<JSPARSE_FLOAT16, 128, 4>(
    const ForwardParams &, cudaStream_t);
