// The C interface: checks, TMA descriptors, the choice of the kernel, its launch.
#include "jsparse/forward.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernel/params.h"
#include "kernel/tile_config.h"

namespace jsparse {
namespace {

// What is wrong with a call or a launch, in words for the caller.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(cudaError_t status, const char *what) {
  if (status == cudaSuccess) return;
  throw Failure(std::string(what) + ": " + cudaGetErrorString(status));
}

// Refuses `name` = value unless `ok`.
void expect(bool ok, const char *name, long long value, const char *expected) {
  if (ok) return;
  throw Failure(std::string(name) + "=" + std::to_string(value) + "; expected " + expected);
}

void expect_array(const void *array, const char *name) {
  if (array == nullptr) throw Failure(std::string(name) + " is NULL; expected an array");
  if (reinterpret_cast<uintptr_t>(array) % 16 != 0) {
    throw Failure(std::string(name) + " is not aligned; expected a multiple of 16 bytes");
  }
}

void check_args(const jsparse_forward_args &a) {
  expect(a.dtype == JSPARSE_FLOAT16 || a.dtype == JSPARSE_BFLOAT16, "dtype", a.dtype,
         "JSPARSE_FLOAT16 or JSPARSE_BFLOAT16");
  expect(a.batch > 0, "batch", a.batch, "at least 1");
  expect(a.q_len > 0, "q_len", a.q_len, "at least 1");
  expect(a.kv_len > 0, "kv_len", a.kv_len, "at least 1");
  expect(a.num_kv_heads > 0, "num_kv_heads", a.num_kv_heads, "at least 1");
  expect(a.num_heads > 0 && a.num_heads % a.num_kv_heads == 0, "num_heads", a.num_heads,
         "a multiple of num_kv_heads");
  expect(a.head_dim == 32 || a.head_dim == 64 || a.head_dim == 128, "head_dim", a.head_dim,
         "32, 64 or 128");
  expect(a.block_q == 64 || a.block_q == 128, "block_q", a.block_q, "64 or 128");
  expect(a.block_kv == 64 || a.block_kv == 128, "block_kv", a.block_kv, "64 or 128");
  if (!(a.scale > 0) || !std::isfinite(a.scale)) {
    throw Failure("scale=" + std::to_string(a.scale) + "; expected a positive number");
  }
  expect(a.tile_q == 64 || a.tile_q == a.block_q, "tile_q", a.tile_q, "64 or block_q");
  expect(!a.share || a.tile_q == 64, "share", a.share, "0 unless tile_q is 64");
  int walkers = choose(a.head_dim, a.tile_q, a.block_kv, a.share).walkers();
  expect(a.num_workers > 0 && a.num_workers % walkers == 0, "num_workers", a.num_workers,
         "a multiple of jsparse_forward_walkers");
  expect(a.items_per_worker > 0, "items_per_worker", a.items_per_worker, "at least 1");
  expect(a.num_split_rows >= 0, "num_split_rows", a.num_split_rows, "at least 0");
  expect(a.num_rules >= 0 && a.num_rules <= JSPARSE_MAX_RULES, "num_rules", a.num_rules,
         "at most JSPARSE_MAX_RULES");
  expect_array(a.q, "q");
  expect_array(a.k, "k");
  expect_array(a.v, "v");
  expect_array(a.out, "out");
  expect_array(a.items, "items");
  for (int i = 0; i < a.num_rules; ++i) {
    int kind = a.rules[i].kind;
    expect(kind >= JSPARSE_SAME_LABEL && kind <= JSPARSE_WITHIN, "rules[].kind", kind,
           "a jsparse_rule_kind");
  }
}

// A 4-D array [B, tokens, heads, dim] whose boxes are `rows` tokens of one head, swizzled as the
// layouts of collective/tiles.cuh.
CUtensorMap tensor_map(const jsparse_forward_args &a, const void *array, int tokens, int heads,
                       int rows) {
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
  uint64_t dim = a.head_dim, row = 2 * dim;
  cuuint64_t sizes[] = {dim, uint64_t(heads), uint64_t(tokens), uint64_t(a.batch)};
  cuuint64_t strides[] = {row, row * heads, row * heads * tokens};
  cuuint32_t box[] = {a.head_dim < 64 ? 32u : 64u, 1, cuuint32_t(rows), 1};
  cuuint32_t steps[] = {1, 1, 1, 1};
  auto type = a.dtype == JSPARSE_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  auto swizzle = a.head_dim < 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMap map;
  CUresult status =
      encode(&map, type, 4, const_cast<void *>(array), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Failure("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(status) +
                  " for an array of " + std::to_string(a.batch) + " x " + std::to_string(tokens) +
                  " x " + std::to_string(heads) + " x " + std::to_string(dim));
  }
  return map;
}

template <jsparse_dtype kDtype>
cudaError_t launch_of_dtype(const ForwardParams &params, cudaStream_t stream) {
  switch (params.args.head_dim) {
    case 32:
      return launch_forward<kDtype, 32>(params, stream);
    case 64:
      return launch_forward<kDtype, 64>(params, stream);
    default:
      return launch_forward<kDtype, 128>(params, stream);
  }
}

void forward(const jsparse_forward_args &a, cudaStream_t stream) {
  check_args(a);
  int tile_kv = choose(a.head_dim, a.tile_q, a.block_kv, a.share).tile_kv;
  ForwardParams params;
  params.args = a;
  params.scale_log2 = a.scale * 1.4426950408889634f;
  params.num_q_blocks = (a.q_len + a.block_q - 1) / a.block_q;
  params.num_kv_blocks = (a.kv_len + a.block_kv - 1) / a.block_kv;
  params.q = tensor_map(a, a.q, a.q_len, a.num_heads, 64);
  params.k = tensor_map(a, a.k, a.kv_len, a.num_kv_heads, tile_kv);
  params.v = tensor_map(a, a.v, a.kv_len, a.num_kv_heads, tile_kv);
  check(a.dtype == JSPARSE_FLOAT16 ? launch_of_dtype<JSPARSE_FLOAT16>(params, stream)
                                   : launch_of_dtype<JSPARSE_BFLOAT16>(params, stream),
        "launch of the forward kernel");
  if (a.num_split_rows > 0) check(launch_merge(a, stream), "launch of the merge kernel");
}

}  // namespace
}  // namespace jsparse

extern "C" int32_t jsparse_forward_walkers(int32_t head_dim, int32_t tile_q, int32_t block_kv,
                                           int32_t share) {
  if (!jsparse::has_kernel(head_dim, tile_q, block_kv, share)) return 0;
  return jsparse::choose(head_dim, tile_q, block_kv, share).walkers();
}

extern "C" int jsparse_forward(const jsparse_forward_args *args, void *stream, char *message,
                               size_t message_size) {
  try {
    jsparse::forward(*args, static_cast<cudaStream_t>(stream));
    return 0;
  } catch (const std::exception &failure) {
    std::string text = failure.what();
    if (message_size > 0) message[text.copy(message, message_size - 1)] = '\0';
    return 1;
  }
}
