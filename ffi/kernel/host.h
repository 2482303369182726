// What the host code of the passes shares: checks in words for the caller, and TMA descriptors.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "jsparse/types.h"
#include "kernel/head_dim.h"

namespace jsparse {

// What is wrong with a call or a launch.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const char *what) {
  if (status == cudaSuccess) return;
  throw Failure(std::string(what) + ": " + cudaGetErrorString(status));
}

// Refuses `name` = value unless `ok`.
inline void expect(bool ok, const char *name, long long value, const char *expected) {
  if (ok) return;
  throw Failure(std::string(name) + "=" + std::to_string(value) + "; expected " + expected);
}

inline void expect_array(const void *array, const char *name) {
  if (array == nullptr) throw Failure(std::string(name) + " is NULL; expected an array");
  if (reinterpret_cast<uintptr_t>(array) % 16 != 0) {
    throw Failure(std::string(name) + " is not aligned; expected a multiple of 16 bytes");
  }
}

// Sizes and arrays that jsparse_forward_args and jsparse_backward_args both have.
template <class Args>
void check_sizes(const Args &a) {
  expect(a.dtype == JSPARSE_FLOAT16 || a.dtype == JSPARSE_BFLOAT16, "dtype", a.dtype,
         "JSPARSE_FLOAT16 or JSPARSE_BFLOAT16");
  expect(a.batch > 0, "batch", a.batch, "at least 1");
  expect(a.q_len > 0, "q_len", a.q_len, "at least 1");
  expect(a.kv_len > 0, "kv_len", a.kv_len, "at least 1");
  expect(a.num_kv_heads > 0, "num_kv_heads", a.num_kv_heads, "at least 1");
  expect(a.num_heads > 0 && a.num_heads % a.num_kv_heads == 0, "num_heads", a.num_heads,
         "a multiple of num_kv_heads");
  expect(kernel_head_dim(a.head_dim) > 0, "head_dim", a.head_dim, "a multiple of 8 up to 128");
  expect(a.block_q == 64 || a.block_q == 128, "block_q", a.block_q, "64 or 128");
  expect(a.block_kv == 64 || a.block_kv == 128, "block_kv", a.block_kv, "64 or 128");
  if (!(a.scale > 0) || !std::isfinite(a.scale)) {
    throw Failure("scale=" + std::to_string(a.scale) + "; expected a positive number");
  }
  expect_array(a.q, "q");
  expect_array(a.k, "k");
  expect_array(a.v, "v");
}

inline void check_schedule(const jsparse_schedule &s, int walkers) {
  expect(s.num_workers > 0 && s.num_workers % walkers == 0, "num_workers", s.num_workers,
         "a multiple of the walkers of a multiprocessor");
  expect(s.items_per_worker > 0, "items_per_worker", s.items_per_worker, "at least 1");
  expect(s.num_split_rows >= 0, "num_split_rows", s.num_split_rows, "at least 0");
  expect_array(s.item_count, "item_count");
  expect_array(s.items, "items");
  if (s.num_split_rows == 0) return;
  expect(s.most_parts > 0, "most_parts", s.most_parts, "at least 1 where rows are split");
  expect_array(s.split_rows, "split_rows");
  expect_array(s.split_slots, "split_slots");
}

inline void check_elements(const jsparse_elements &e) {
  expect(e.num_rules >= 0 && e.num_rules <= JSPARSE_MAX_RULES, "num_rules", e.num_rules,
         "at most JSPARSE_MAX_RULES");
  for (int i = 0; i < e.num_rules; ++i) {
    int kind = e.rules[i].kind;
    expect(kind >= JSPARSE_SAME_LABEL && kind <= JSPARSE_WITHIN, "rules[].kind", kind,
           "a jsparse_rule_kind");
    expect_array(e.rules[i].first, "rules[].first");
    expect_array(e.rules[i].second, "rules[].second");
    if (kind == JSPARSE_WITHIN) expect_array(e.rules[i].third, "rules[].third");
  }
}

// The bias of `a`, an argument of either pass.
template <class Args>
void check_bias(const Args &a) {
  const jsparse_bias &b = a.bias;
  if (b.values == nullptr) return;
  expect_array(b.values, "bias.values");
  expect(b.dtype >= JSPARSE_FLOAT16 && b.dtype <= JSPARSE_FLOAT32, "bias.dtype", b.dtype,
         "a jsparse_dtype");
  expect(b.entries > 0, "bias.entries", b.entries, "at least 1");
  expect(b.inner > 0, "bias.inner", b.inner, "at least 1");
  expect(b.heads == 1 || b.heads == a.num_heads, "bias.heads", b.heads, "1 or num_heads");
  expect(b.num_blocks >= 0, "bias.num_blocks", b.num_blocks, "at least 0");
  if (b.num_blocks > 0) {
    expect(b.rows == a.block_q, "bias.rows", b.rows, "block_q");
    expect(b.columns == a.block_kv, "bias.columns", b.columns, "block_kv");
    if (b.partial_numbers == nullptr && b.full_numbers == nullptr) {
      throw Failure("bias.partial_numbers and bias.full_numbers are NULL; expected those of the lists");
    }
    return;
  }
  expect(b.rows == a.q_len || (b.rows == 1 && b.dtype == JSPARSE_FLOAT32), "bias.rows", b.rows,
         "q_len, or 1 of a bias in float32");
  expect(b.columns >= a.kv_len && b.columns % (b.dtype == JSPARSE_FLOAT32 ? 4 : 8) == 0,
         "bias.columns", b.columns, "whole 16 bytes, at least kv_len");
}

// An array whose sizes and strides, in bytes, are told from the last axis on; boxes lie in shared memory in
// rows of `row` bytes, swizzled.
template <size_t kAxes>
CUtensorMap tensor_map(jsparse_dtype dtype, const void *array, const cuuint64_t (&sizes)[kAxes],
                       const cuuint64_t (&strides)[kAxes - 1], const cuuint32_t (&box)[kAxes], int row) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw Failure("this NVIDIA driver has no cuTensorMapEncodeTiled; expected CUDA 12 or newer");
    }
    return reinterpret_cast<Encode>(function);
  }();
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  cuuint32_t steps[kAxes];
  std::fill_n(steps, kAxes, 1);
  CUtensorMap map;
  CUresult status =
      encode(&map, kTypes[dtype], kAxes, const_cast<void *>(array), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return map;
  std::string shape;
  for (size_t i = kAxes; i-- > 0;) shape += std::to_string(sizes[i]) + (i > 0 ? " x " : "");
  throw Failure("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(status) +
                " for an array of " + shape);
}

// An array [B, tokens, heads, dim] of the dtype of `a`, whose boxes are `box_tokens` tokens of one head, as
// the layouts of collective/tiles.cuh, with zeros beyond dim.
template <class Args>
CUtensorMap tensor_map(const Args &a, const void *array, int tokens, int heads, int box_tokens) {
  cuuint64_t dim = a.head_dim, row = 2 * dim;
  cuuint64_t sizes[] = {dim, cuuint64_t(heads), cuuint64_t(tokens), cuuint64_t(a.batch)};
  cuuint64_t strides[] = {row, row * heads, row * heads * tokens};
  cuuint32_t columns = std::min(kernel_head_dim(a.head_dim), 64);
  cuuint32_t box[] = {columns, 1, cuuint32_t(box_tokens), 1};
  return tensor_map(a.dtype, array, sizes, strides, box, 2 * columns);
}

// A bias as [arrays, rows, columns], whose boxes are `box_rows` rows of 128 bytes.
inline CUtensorMap bias_map(const jsparse_bias &b, int box_rows) {
  cuuint64_t size = b.dtype == JSPARSE_FLOAT32 ? 4 : 2, row = b.columns * size;
  cuuint64_t arrays = cuuint64_t(b.entries) * b.heads * (b.num_blocks > 0 ? b.num_blocks : 1);
  cuuint64_t sizes[] = {cuuint64_t(b.columns), cuuint64_t(b.rows), arrays};
  cuuint64_t strides[] = {row, row * b.rows};
  cuuint32_t box[] = {cuuint32_t(128 / size), cuuint32_t(box_rows), 1};
  return tensor_map(b.dtype, b.values, sizes, strides, box, 128);
}

// Returns 0, or 1 after writing to `message` what `launch` threw.
template <class Launch>
int report(Launch launch, char *message, size_t message_size) {
  try {
    launch();
    return 0;
  } catch (const std::exception &failure) {
    std::string text = failure.what();
    if (message_size > 0) message[text.copy(message, message_size - 1)] = '\0';
    return 1;
  }
}

}  // namespace jsparse
