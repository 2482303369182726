// The C interface of the forward pass: checks, TMA descriptors, the choice of the kernel, its launch.
#include "jsparse/forward.h"

#include "kernel/host.h"
#include "kernel/params.h"
#include "kernel/tile_config.h"

namespace jsparse {
namespace {

void check_args(const jsparse_forward_args &a) {
  check_sizes(a);
  expect(a.tile_q == 64 || a.tile_q == a.block_q, "tile_q", a.tile_q, "64 or block_q");
  expect(!a.share || a.tile_q == 64, "share", a.share, "0 unless tile_q is 64");
  check_schedule(a.schedule, choose(a.head_dim, a.tile_q, a.block_kv, a.share).walkers());
  check_elements(a.elements);
  check_bias(a);
  expect_array(a.out, "out");
  expect_array(a.lse, "lse");
  if (a.schedule.num_split_rows == 0) return;
  expect_array(a.part_out, "part_out");
  expect_array(a.part_lse, "part_lse");
}

template <jsparse_dtype kDtype, bool kBias>
cudaError_t launch_of(const ForwardParams &params, cudaStream_t stream) {
  switch (params.args.head_dim) {
    case 32:
      return launch_forward<kDtype, 32, kBias>(params, stream);
    case 64:
      return launch_forward<kDtype, 64, kBias>(params, stream);
    default:
      return launch_forward<kDtype, 128, kBias>(params, stream);
  }
}

template <jsparse_dtype kDtype>
cudaError_t launch_of_dtype(const ForwardParams &params, cudaStream_t stream) {
  return params.args.bias.values == nullptr ? launch_of<kDtype, false>(params, stream)
                                            : launch_of<kDtype, true>(params, stream);
}

void forward(const jsparse_forward_args &a, cudaStream_t stream) {
  check_args(a);
  int tile_kv = choose(a.head_dim, a.tile_q, a.block_kv, a.share).tile_kv;
  ForwardParams params;
  params.args = a;
  params.scale_log2 = a.scale * 1.4426950408889634f;
  params.sizes = block_sizes(a.block_q, a.q_len, a.block_kv, a.kv_len);
  params.inverse_scale = 1.0f / a.scale;
  params.q = tensor_map(a, a.q, a.q_len, a.num_heads, 64);
  params.k = tensor_map(a, a.k, a.kv_len, a.num_kv_heads, tile_kv);
  params.v = tensor_map(a, a.v, a.kv_len, a.num_kv_heads, tile_kv);
  check(a.dtype == JSPARSE_FLOAT16 ? launch_of_dtype<JSPARSE_FLOAT16>(params, stream)
                                   : launch_of_dtype<JSPARSE_BFLOAT16>(params, stream),
        "launch of the forward kernel");
  if (a.schedule.num_split_rows > 0) check(launch_merge(a, stream), "launch of the merge kernel");
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
  auto launch = [&] { jsparse::forward(*args, static_cast<cudaStream_t>(stream)); };
  return jsparse::report(launch, message, message_size);
}
