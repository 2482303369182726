// What a launch passes to the kernels, by value.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "jsparse/backward.h"
#include "jsparse/forward.h"

namespace jsparse {

// Rows and columns of a block, which are powers of two, and of all blocks.
struct BlockSizes {
  int block_rows, block_columns;
  int rows, columns;
};

constexpr BlockSizes block_sizes(int block_rows, int row_len, int block_columns, int column_len) {
  auto whole = [](int length, int block) { return (length + block - 1) / block * block; };
  return {block_rows, block_columns, whole(row_len, block_rows), whole(column_len, block_columns)};
}

struct ForwardParams {
  CUtensorMap q, k, v;
  jsparse_forward_args args;
  float scale_log2;  // args.scale / ln 2: the softmax is in base 2
  BlockSizes sizes;
  float inverse_scale;  // what a bias is multiplied by
  CUtensorMap bias;
};

// An output of a backward kernel: rows of blocks, or parts of split ones in the workspace. NULL if it
// is not asked for.
struct Gradient {
  void *whole;  // [B, tokens, heads, size]
  float *part;  // [slots, block_rows, size]
  float scale;  // of the sums
  jsparse_dtype dtype;  // of whole
  int size;
};

// Rows are queries and columns keys for dq, the reverse for dk and dv. Of the two tiles of a token,
// the first is q or k, the second dout or v.
struct BackwardParams {
  CUtensorMap rows[2], columns[2];
  jsparse_backward_args args;
  float scale_log2;
  BlockSizes sizes;
  Gradient first, second;  // dk and dv; or both dq
  float inverse_scale;     // what a bias is multiplied by
  void *bias_gradient;     // of dq: like the bias, or NULL
  Gradient by_key;         // of dk and dv: the gradient of a bias by key, of each batch entry and head
  jsparse_turns turns;     // of all gradients: where a step adds its part of dq
  CUtensorMap bias, bias_gradient_map;  // of all gradients
};

// dq, dk or dv, and its parts; and the gradient of a bias by key.
inline Gradient gradient_of(const jsparse_backward_args &args, void *whole, float *part, float scale) {
  return {whole, part, scale, args.dtype, args.head_dim};
}
inline Gradient by_key_of(float *whole, float *part) {
  return {whole, part, 1.0f, JSPARSE_FLOAT32, 1};
}

// Launches the kernel of one head size and dtype, and of values of a bias of so many bytes, or 0, or with or
// without a bias; instantiate/ has the files.
template <jsparse_dtype kDtype, int kHeadDim, int kBiasSize>
cudaError_t launch_forward(const ForwardParams &params, cudaStream_t stream);
template <jsparse_dtype kDtype, int kHeadDim, bool kBias>
cudaError_t launch_backward(const BackwardParams &params, bool keys, cudaStream_t stream);

// Launches the kernel of all gradients, and the one that finishes dq.
template <jsparse_dtype kDtype, int kHeadDim, bool kBias>
cudaError_t launch_gradients(const BackwardParams &params, cudaStream_t stream);
cudaError_t launch_finish_dq(const BackwardParams &params, void *dq, cudaStream_t stream);

// Launches the merge of split rows, after the forward kernel.
cudaError_t launch_merge(const jsparse_forward_args &args, cudaStream_t stream);
// Launches the sum of the parts of a gradient's split rows, of which it has `tokens`, after the kernel.
cudaError_t launch_sum(const BackwardParams &params, const Gradient &gradient, int tokens,
                       cudaStream_t stream);

}  // namespace jsparse
