// What a launch passes to the kernels, by value.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "jsparse/forward.h"

namespace jsparse {

struct ForwardParams {
  CUtensorMap q, k, v;
  jsparse_forward_args args;
  float scale_log2;  // args.scale / ln 2: the softmax is in base 2
  int num_q_blocks, num_kv_blocks;
};

// Launches the kernel of one head size and dtype; instantiate/ has one file for each.
template <jsparse_dtype kDtype, int kHeadDim>
cudaError_t launch_forward(const ForwardParams &params, cudaStream_t stream);

// Launches the merge of split rows, after the forward kernel.
cudaError_t launch_merge(const jsparse_forward_args &args, cudaStream_t stream);

}  // namespace jsparse
