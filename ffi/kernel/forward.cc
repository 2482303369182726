// The C interface of the forward pass: checks, TMA descriptors, the choice of the kernel, its launch.
#include "jsparse/forward.h"

#include "kernel/host.h"
#include "kernel/params.h"
#include "kernel/tile_config.h"

namespace jsparse {
namespace {

int bias_size(const jsparse_forward_args &a) {
  return a.bias.values == nullptr ? 0 : a.bias.dtype == JSPARSE_FLOAT32 ? 4 : 2;
}

TileConfig config_of(const jsparse_forward_args &a) {
  return choose(kernel_head_dim(a.head_dim), a.tile_q, a.block_kv, a.share, bias_size(a));
}

void check_args(const jsparse_forward_args &a) {
  check_sizes(a);
  const bool whole = a.elements.bits == nullptr && a.elements.num_rules == 0;
  const bool high = a.tile_q == 256 && whole && a.bias.values != nullptr && a.head_dim <= 32;
  expect(a.tile_q == 64 || a.tile_q == a.block_q || high, "tile_q", a.tile_q,
         "64, block_q, or 256 beside a bias, with head sizes up to 32 and no test but that of lengths");
  expect(!a.share || a.tile_q == 64, "share", a.share, "0 unless tile_q is 64");
  check_bias(a);
  if (a.bias.values != nullptr) {
    expect(a.bias.dtype == a.dtype || a.bias.dtype == JSPARSE_FLOAT32, "bias.dtype", a.bias.dtype,
           "dtype or JSPARSE_FLOAT32");
    expect(!a.share, "share", a.share, "0 beside a bias");
  }
  check_schedule(a.schedule, config_of(a).walkers());
  check_elements(a.elements);
  expect_array(a.out, "out");
  expect_array(a.lse, "lse");
  if (a.schedule.num_split_rows == 0) return;
  expect_array(a.part_out, "part_out");
  expect_array(a.part_lse, "part_lse");
}

template <jsparse_dtype kDtype, int kBiasSize>
cudaError_t launch_of(const ForwardParams &params, cudaStream_t stream) {
  switch (kernel_head_dim(params.args.head_dim)) {
    case 32:
      return launch_forward<kDtype, 32, kBiasSize>(params, stream);
    case 64:
      return launch_forward<kDtype, 64, kBiasSize>(params, stream);
    default:
      return launch_forward<kDtype, 128, kBiasSize>(params, stream);
  }
}

template <jsparse_dtype kDtype>
cudaError_t launch_of_dtype(const ForwardParams &params, cudaStream_t stream) {
  switch (bias_size(params.args)) {
    case 0:
      return launch_of<kDtype, 0>(params, stream);
    case 2:
      return launch_of<kDtype, 2>(params, stream);
    default:
      return launch_of<kDtype, 4>(params, stream);
  }
}

void forward(const jsparse_forward_args &a, cudaStream_t stream) {
  check_args(a);
  int tile_kv = config_of(a).tile_kv;
  ForwardParams params;
  params.args = a;
  params.scale_log2 = a.scale * 1.4426950408889634f;
  params.sizes = block_sizes(a.block_q, a.q_len, a.block_kv, a.kv_len);
  params.inverse_scale = 1.0f / a.scale;
  params.q = tensor_map(a, a.q, a.q_len, a.num_heads, 64);
  params.k = tensor_map(a, a.k, a.kv_len, a.num_kv_heads, tile_kv);
  params.v = tensor_map(a, a.v, a.kv_len, a.num_kv_heads, tile_kv);
  if (a.bias.values != nullptr) params.bias = bias_map(a.bias, a.bias.rows == 1 ? 1 : a.tile_q);
  check(a.dtype == JSPARSE_FLOAT16 ? launch_of_dtype<JSPARSE_FLOAT16>(params, stream)
                                   : launch_of_dtype<JSPARSE_BFLOAT16>(params, stream),
        "launch of the forward kernel");
  if (a.schedule.num_split_rows > 0) check(launch_merge(a, stream), "launch of the merge kernel");
}

}  // namespace
}  // namespace jsparse

extern "C" int32_t jsparse_forward_walkers(int32_t head_dim, int32_t tile_q, int32_t block_kv,
                                           int32_t share, int32_t bias_size) {
  int dim = jsparse::kernel_head_dim(head_dim);
  if (!jsparse::has_kernel(dim, tile_q, block_kv, share, bias_size)) return 0;
  return jsparse::choose(dim, tile_q, block_kv, share, bias_size).walkers();
}

extern "C" int jsparse_forward(const jsparse_forward_args *args, void *stream, char *message,
                               size_t message_size) {
  auto launch = [&] { jsparse::forward(*args, static_cast<cudaStream_t>(stream)); };
  return jsparse::report(launch, message, message_size);
}
