// Combines the parts of split rows, in their order: of an output, their mean weighted by exp(lse); of
// a gradient, their sum.
//
// A warp computes one row, each lane some of its columns.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "collective/dq_by_key.cuh"
#include "kernel/head_dim.h"
#include "kernel/params.h"

namespace jsparse {
namespace {

constexpr int kWarps = 4;

template <class Element>
__global__ void __launch_bounds__(32 * kWarps) merge(const jsparse_forward_args args) {
  int lane = threadIdx.x % 32, in_tile = blockIdx.y * kWarps + threadIdx.x / 32;
  const jsparse_schedule &schedule = args.schedule;
  const int32_t *place = schedule.split_rows + 3 * int64_t(blockIdx.x);
  const int32_t *slots = schedule.split_slots + int64_t(blockIdx.x) * schedule.most_parts;
  int token = place[2] * args.tile_q + in_tile;
  if (token >= args.q_len) return;

  float top = -INFINITY;
  for (int part = 0; part < schedule.most_parts; ++part) {
    int64_t at = int64_t(slots[part]) * args.tile_q + in_tile;
    if (slots[part] >= 0) top = fmaxf(top, args.part_lse[at]);
  }
  float base = top == -INFINITY ? 0.0f : top, total = 0.0f, sums[4] = {};
  for (int part = 0; part < schedule.most_parts; ++part) {
    if (slots[part] < 0) continue;
    int64_t at = int64_t(slots[part]) * args.tile_q + in_tile;
    float weight = expf(args.part_lse[at] - base);
    total += weight;
    for (int i = 0; i < 4; ++i) {
      int column = lane + 32 * i;
      if (column < args.head_dim) sums[i] += weight * args.part_out[at * args.head_dim + column];
    }
  }
  float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  int64_t head = int64_t(place[0]) * args.num_heads + place[1];
  if (lane == 0) args.lse[head * args.q_len + token] = base + logf(total);
  int64_t row = (int64_t(place[0]) * args.q_len + token) * args.num_heads + place[1];
  for (int i = 0; i < 4; ++i) {
    int column = lane + 32 * i;
    if (column >= args.head_dim) continue;
    static_cast<Element *>(args.out)[row * args.head_dim + column] = Element(sums[i] * inverse);
  }
}

template <class Element>
__global__ void __launch_bounds__(32 * kWarps)
    sum(const jsparse_schedule schedule, const Gradient gradient, int tokens, int heads,
        int block_rows) {
  int lane = threadIdx.x % 32, in_block = blockIdx.y * kWarps + threadIdx.x / 32;
  const int32_t *place = schedule.split_rows + 3 * int64_t(blockIdx.x);
  const int32_t *slots = schedule.split_slots + int64_t(blockIdx.x) * schedule.most_parts;
  int token = place[2] * block_rows + in_block;
  if (token >= tokens) return;
  int64_t row = (int64_t(place[0]) * tokens + token) * heads + place[1];
  for (int column = lane; column < gradient.size; column += 32) {
    float total = 0.0f;
    for (int part = 0; part < schedule.most_parts; ++part) {
      int64_t at = int64_t(slots[part]) * block_rows + in_block;
      if (slots[part] >= 0) total += gradient.part[at * gradient.size + column];
    }
    static_cast<Element *>(gradient.whole)[row * gradient.size + column] = Element(total);
  }
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(256) finish_dq(const jsparse_backward_args args, const jsparse_turns turns,
                                                 int num_tiles, void *dq) {
  FinishDq<Element, kHeadDim>{args, turns, dq}.run(blockIdx.x, num_tiles, threadIdx.x);
}

template <class Element>
cudaError_t launch_finish_dq(const BackwardParams &params, void *dq, cudaStream_t stream) {
  const jsparse_backward_args &args = params.args;
  const int dim = kernel_head_dim(args.head_dim);
  auto *kernel = dim == 32   ? &finish_dq<Element, 32>
                 : dim == 64 ? &finish_dq<Element, 64>
                             : &finish_dq<Element, 128>;
  int num_tiles = params.sizes.columns / (dim > 64 ? 64 : 128);
  int64_t places = int64_t(args.batch) * args.num_heads * num_tiles;
  kernel<<<places, 256, 0, stream>>>(args, params.turns, num_tiles, dq);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_finish_dq(const BackwardParams &params, void *dq, cudaStream_t stream) {
  return params.args.dtype == JSPARSE_FLOAT16
             ? launch_finish_dq<cutlass::half_t>(params, dq, stream)
             : launch_finish_dq<cutlass::bfloat16_t>(params, dq, stream);
}

cudaError_t launch_sum(const BackwardParams &params, const Gradient &gradient, int tokens,
                       cudaStream_t stream) {
  const jsparse_backward_args &args = params.args;
  int block_rows = params.sizes.block_rows;
  dim3 grid(args.schedule.num_split_rows, block_rows / kWarps);
  auto *kernel = gradient.dtype == JSPARSE_FLOAT32   ? &sum<float>
                 : gradient.dtype == JSPARSE_FLOAT16 ? &sum<cutlass::half_t>
                                                     : &sum<cutlass::bfloat16_t>;
  kernel<<<grid, 32 * kWarps, 0, stream>>>(args.schedule, gradient, tokens, args.num_heads,
                                           block_rows);
  return cudaGetLastError();
}

cudaError_t launch_merge(const jsparse_forward_args &args, cudaStream_t stream) {
  dim3 grid(args.schedule.num_split_rows, args.tile_q / kWarps);
  auto *kernel = args.dtype == JSPARSE_FLOAT16 ? &merge<cutlass::half_t>
                                               : &merge<cutlass::bfloat16_t>;
  kernel<<<grid, 32 * kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace jsparse
