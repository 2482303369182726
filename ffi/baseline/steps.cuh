// What runs beside the two GEMMs, as threads of a CTA see it. The tests run it on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "baseline/grouped_gemm.h"

#ifdef __CUDACC__
#define JSPARSE_STEP __host__ __device__ inline
#else
#define JSPARSE_STEP inline
#endif

namespace jsparse {

// Some of the threads of a CTA: loops begin at `first` and go on by `count`.
struct Threads {
  int first, count;
};

struct alignas(16) Words {
  uint32_t x[4];
};

JSPARSE_STEP int64_t block_elements(const GroupedGemmArgs &a) {
  return int64_t(a.block_q) * a.block_kv;
}

// Where the logits and weights of a row of blocks start.
JSPARSE_STEP int64_t start_of_row(const GroupedGemmArgs &a, int head, int row) {
  return (int64_t(head) * a.num_blocks + a.row_start[row]) * block_elements(a);
}

JSPARSE_STEP int keys_of_row(const GroupedGemmArgs &a, int row) {
  return (a.row_start[row + 1] - a.row_start[row]) * a.block_kv;
}

JSPARSE_STEP void set_problem(const Problems &problems, int64_t n, int m, int cols, int k) {
  problems.shape[3 * n] = m;
  problems.shape[3 * n + 1] = cols;
  problems.shape[3 * n + 2] = k;
}

// Listed block n: its values to their place, its logits' problem for each head.
template <class Element>
JSPARSE_STEP void prepare_block(const GroupedGemmArgs &a, int n, Threads threads) {
  int64_t token = int64_t(a.heads) * a.head_dim, block = a.block_kv * token;
  auto *from = reinterpret_cast<const Words *>(static_cast<const Element *>(a.v) +
                                               a.columns[n] * block);
  auto *to = reinterpret_cast<Words *>(static_cast<Element *>(a.gathered) + n * block);
  for (int64_t i = threads.first; i < block / 8; i += threads.count) to[i] = from[i];

  int row = a.rows[n];
  for (int head = threads.first; head < a.heads; head += threads.count) {
    int64_t at = int64_t(head) * a.num_blocks + n;
    const Problems &problems = a.of_logits;
    set_problem(problems, at, a.block_q, a.block_kv, a.head_dim);
    auto of_head = [&](const void *x, int64_t tokens) {
      return static_cast<const Element *>(x) + tokens * token + head * a.head_dim;
    };
    problems.a[at] = of_head(a.q, int64_t(row) * a.block_q);
    problems.b[at] = of_head(a.k, int64_t(a.columns[n]) * a.block_kv);
    problems.d[at] = a.logits + start_of_row(a, head, row) + (n - a.row_start[row]) * a.block_kv;
    problems.lda[at] = problems.ldb[at] = token;
    problems.ldd[at] = keys_of_row(a, row);
  }
}

// A row of blocks: its problem of the output for each head, or zeros if it has no blocks.
template <class Element>
JSPARSE_STEP void prepare_row(const GroupedGemmArgs &a, int row, Threads threads) {
  int64_t token = int64_t(a.heads) * a.head_dim;
  int keys = keys_of_row(a, row);
  auto *out = static_cast<Element *>(a.out) + row * a.block_q * token;
  for (int head = threads.first; head < a.heads; head += threads.count) {
    int64_t at = int64_t(head) * a.num_rows + row;
    const Problems &problems = a.of_out;
    set_problem(problems, at, keys == 0 ? 0 : a.block_q, a.head_dim, keys);
    problems.a[at] = static_cast<Element *>(a.weights) + start_of_row(a, head, row);
    problems.b[at] = static_cast<Element *>(a.gathered) +
                     int64_t(a.row_start[row]) * a.block_kv * token + head * a.head_dim;
    problems.d[at] = out + head * a.head_dim;
    problems.lda[at] = keys;
    problems.ldb[at] = problems.ldd[at] = token;
  }
  if (keys > 0) return;
  for (int64_t i = threads.first; i < a.block_q * token; i += threads.count) out[i] = Element(0);
}

// The largest of some logits, and the sum of 2^(logit - largest) over them.
struct Sum {
  float top = -INFINITY, total = 0;

  JSPARSE_STEP void add(float logit) {
    if (logit > top) {
      total *= exp2f(top - logit);
      top = logit;
    }
    total += exp2f(logit - top);
  }
  JSPARSE_STEP void add(Sum other) {
    float larger = fmaxf(top, other.top);
    // Threads without logits have -inf.
    total *= top == larger ? 1 : exp2f(top - larger);
    total += other.total * (other.top == larger ? 1 : exp2f(other.top - larger));
    top = larger;
  }
};

// One query: the sum over the logits that some threads see.
JSPARSE_STEP Sum sum_logits(const float *logits, int keys, float scale_log2, Threads threads) {
  Sum sum;
  for (int i = 4 * threads.first; i < keys; i += 4 * threads.count) {
    float4 four = *reinterpret_cast<const float4 *>(logits + i);
    for (float x : {four.x, four.y, four.z, four.w}) sum.add(x * scale_log2);
  }
  return sum;
}

// The weights of the same logits, given the sum over all.
template <class Element>
JSPARSE_STEP void write_weights(const float *logits, Element *weights, int keys, float scale_log2,
                                Sum sum, Threads threads) {
  struct alignas(8) Four {
    Element x[4];
  };
  float inverse = 1 / sum.total;
  for (int i = 4 * threads.first; i < keys; i += 4 * threads.count) {
    float4 four = *reinterpret_cast<const float4 *>(logits + i);
    float x[] = {four.x, four.y, four.z, four.w};
    Four out;
    for (int j = 0; j < 4; ++j) out.x[j] = Element(exp2f(x[j] * scale_log2 - sum.top) * inverse);
    *reinterpret_cast<Four *>(weights + i) = out;
  }
}

}  // namespace jsparse
