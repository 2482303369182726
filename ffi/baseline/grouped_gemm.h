// A baseline to measure the fused kernel against: two grouped GEMMs with a softmax between them.
//
//   logits  = q k^T         a problem for each listed block of each head
//   weights = softmax       over all keys of a query
//   out     = weights v     a problem for each row of blocks of each head
//
// Called by jsparse/bench/_grouped_gemm.py only. Whole blocks, one pattern for all heads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "jsparse/forward.h"

namespace jsparse {

// What the problems of one grouped GEMM are, d = a b. CUTLASS reads these arrays on the device, and
// `prepare` writes them there. Leading dimensions count elements.
struct Problems {
  int32_t *shape;  // [problems, 3]: m, n, k; m is 0 where there is nothing to compute
  const void **a, **b;
  void **d;
  int64_t *lda, *ldb, *ldd;
  int32_t count;
};

// `shape` and `addresses`: kAddressArrays arrays of eight bytes a problem, one after the other.
constexpr int kAddressArrays = 6;
inline Problems problems_in(int32_t *shape, void *addresses, int32_t count) {
  auto *next = static_cast<int64_t *>(addresses);
  auto array = [&] { return std::exchange(next, next + count); };
  return {shape,
          reinterpret_cast<const void **>(array()),
          reinterpret_cast<const void **>(array()),
          reinterpret_cast<void **>(array()),
          array(),
          array(),
          array(),
          count};
}

struct GroupedGemmArgs {
  jsparse_dtype dtype;
  int32_t heads, head_dim, block_q, block_kv;
  int32_t num_rows;    // of blocks
  int32_t num_blocks;  // that are computed, in each head
  float scale_log2;    // of the logits, over ln 2

  const void *q;             // [num_rows * block_q, H, D]
  const void *k;             // [S, H, D]
  const void *v;             // [S, H, D]
  const int32_t *row_start;  // [num_rows + 1]: first listed block of each row
  const int32_t *rows;       // [num_blocks]: row of each listed block
  const int32_t *columns;    // [num_blocks]: its column
  void *out;                 // [num_rows * block_q, H, D]

  // Of each head, by row of blocks: [block_q, blocks of the row * block_kv].
  float *logits;  // [H, num_blocks * block_q * block_kv]
  void *weights;  // the same in the dtype
  // The values of the listed blocks one after the other: the K of a GEMM must be contiguous.
  void *gathered;  // [num_blocks * block_kv, H, D]
  Problems of_logits, of_out;
  void *workspace;  // of both GEMMs
  int64_t workspace_bytes;
};

// Bytes of workspace on a GPU of so many multiprocessors.
int64_t grouped_gemm_workspace(int32_t multiprocessors);

// Launches all on the stream; throws std::runtime_error if that fails.
void grouped_gemm(const GroupedGemmArgs &args, cudaStream_t stream);

}  // namespace jsparse
