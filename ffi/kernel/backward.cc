// The C interface of the gradients: checks, TMA descriptors, the choice of the kernel, its launch.
#include "jsparse/backward.h"

#include <vector>

#include "kernel/backward_config.h"
#include "kernel/host.h"
#include "kernel/params.h"

namespace jsparse {
namespace {

template <jsparse_dtype kDtype, bool kBias>
cudaError_t launch_of(const BackwardParams &params, bool keys, cudaStream_t stream) {
  switch (kernel_head_dim(params.args.head_dim)) {
    case 32:
      return launch_backward<kDtype, 32, kBias>(params, keys, stream);
    case 64:
      return launch_backward<kDtype, 64, kBias>(params, keys, stream);
    default:
      return launch_backward<kDtype, 128, kBias>(params, keys, stream);
  }
}

template <jsparse_dtype kDtype>
cudaError_t launch_of_dtype(const BackwardParams &params, bool keys, cudaStream_t stream) {
  return params.args.bias.values == nullptr ? launch_of<kDtype, false>(params, keys, stream)
                                            : launch_of<kDtype, true>(params, keys, stream);
}

template <jsparse_dtype kDtype>
cudaError_t launch_all(const BackwardParams &params, cudaStream_t stream) {
  const bool bias = params.args.bias.values != nullptr;
  switch (kernel_head_dim(params.args.head_dim)) {
    case 32:
      return bias ? launch_gradients<kDtype, 32, true>(params, stream)
                  : launch_gradients<kDtype, 32, false>(params, stream);
    case 64:
      return bias ? launch_gradients<kDtype, 64, true>(params, stream)
                  : launch_gradients<kDtype, 64, false>(params, stream);
    default:
      return launch_gradients<kDtype, 128, false>(params, stream);
  }
}

// Whether rows are keys, and where the results go: dq, or dk and dv; and what there is of a bias; or how dq
// is computed beside dk and dv.
struct Outputs {
  bool keys;
  std::vector<Gradient> gradients;
  void *bias_gradient;
  Gradient by_key;
  jsparse_turns turns = {};
  void *dq = nullptr;

  bool all() const { return turns.turns != nullptr; }
};

void check_turns(const jsparse_backward_args &a, const jsparse_turns &turns) {
  const int dim = kernel_head_dim(a.head_dim);
  expect(has_all_kernel(dim, a.block_q, a.block_kv), "block_q * block_kv", a.block_q * a.block_kv,
         "blocks of 128 x 128 for all gradients in one launch");
  if (a.bias.values != nullptr) {
    expect(has_all_kernel(dim, a.block_q, a.block_kv, true), "head_dim", a.head_dim,
           "at most 64 for all gradients beside a bias");
    expect(a.bias.dtype == a.dtype, "bias.dtype", a.bias.dtype, "dtype for all gradients in one launch");
    expect(a.bias.num_blocks > 0 || a.bias.rows == a.q_len, "bias.rows", a.bias.rows,
           "q_len for all gradients in one launch");
  }
  expect_array(turns.turns, "turns");
  expect_array(turns.sums_of, "sums_of");
  expect_array(turns.sums, "sums");
  expect_array(turns.taken, "taken");
  expect(turns.num_sums > 0, "num_sums", turns.num_sums, "at least 1");
}

// No part is added yet.
void clear_turns(const jsparse_turns &turns, cudaStream_t stream) {
  check(cudaMemsetAsync(turns.taken, 0, sizeof(int32_t) * turns.num_sums, stream),
        "clearing the turns");
}

void check_bias_gradients(const jsparse_backward_args &a, const Outputs &to) {
  const jsparse_bias &b = a.bias;
  bool by_key = b.num_blocks == 0 && b.rows == 1;
  if (to.bias_gradient != nullptr) {
    expect_array(to.bias_gradient, "dbias");
    bool own = b.values != nullptr && b.entries == a.batch && b.inner == 1 && b.heads == a.num_heads;
    if (!own || by_key) throw Failure("dbias is given; expected a bias that nobody shares");
  }
  if (to.by_key.whole != nullptr) {
    expect_array(to.by_key.whole, "by_key");
    if (b.values == nullptr || !by_key) throw Failure("by_key is given; expected a bias by key");
    if (a.schedule.num_split_rows > 0) expect_array(to.by_key.part, "part_by_key");
  }
}

void backward(const jsparse_backward_args &a, const Outputs &to, cudaStream_t stream) {
  check_sizes(a);
  const BlockSizes sizes = to.keys ? block_sizes(a.block_kv, a.kv_len, a.block_q, a.q_len)
                                   : block_sizes(a.block_q, a.q_len, a.block_kv, a.kv_len);
  const BackwardConfig config = choose_backward(to.keys, kernel_head_dim(a.head_dim), sizes.block_rows,
                                                sizes.block_columns, false, to.all());
  check_schedule(a.schedule, config.teams);
  expect(!to.keys || a.num_heads == a.num_kv_heads || a.schedule.num_split_rows == 0,
         "num_split_rows", a.schedule.num_split_rows, "0 where query heads share key heads");
  check_elements(a.elements);
  check_bias(a);
  check_bias_gradients(a, to);
  if (to.all()) check_turns(a, to.turns), expect_array(to.dq, "dq");
  expect_array(a.dout, "dout");
  expect_array(a.lse2, "lse2");
  expect_array(a.delta, "delta");
  for (const Gradient &gradient : to.gradients) {
    expect_array(gradient.whole, "a gradient");
    if (a.schedule.num_split_rows > 0) expect_array(gradient.part, "a workspace");
  }

  const void *of_queries[] = {a.q, a.dout}, *of_keys[] = {a.k, a.v};
  BackwardParams params;
  params.args = a;
  params.scale_log2 = a.scale * 1.4426950408889634f;
  params.sizes = sizes;
  params.first = to.gradients.front();
  params.second = to.gradients.back();
  params.inverse_scale = 1.0f / a.scale;
  params.bias_gradient = to.bias_gradient;
  params.by_key = to.by_key;
  params.turns = to.turns;
  for (int i = 0; i < 2; ++i) {
    CUtensorMap queries = tensor_map(a, of_queries[i], a.q_len, a.num_heads,
                                     to.keys ? config.tile : 64);
    CUtensorMap keys = tensor_map(a, of_keys[i], a.kv_len, a.num_kv_heads,
                                  to.keys ? 64 : config.tile);
    params.rows[i] = to.keys ? keys : queries;
    params.columns[i] = to.keys ? queries : keys;
  }
  if (to.all()) {
    if (a.bias.values != nullptr) params.bias = bias_map(a.bias, config.tile);
    if (to.bias_gradient != nullptr) {
      jsparse_bias gradient = a.bias;
      gradient.values = to.bias_gradient;
      params.bias_gradient_map = bias_map(gradient, 64);
    }
    clear_turns(to.turns, stream);
    check(a.dtype == JSPARSE_FLOAT16 ? launch_all<JSPARSE_FLOAT16>(params, stream)
                                     : launch_all<JSPARSE_BFLOAT16>(params, stream),
          "launch of the kernel of all gradients");
    check(launch_finish_dq(params, to.dq, stream), "launch of the kernel that finishes dq");
  } else {
    check(a.dtype == JSPARSE_FLOAT16 ? launch_of_dtype<JSPARSE_FLOAT16>(params, to.keys, stream)
                                     : launch_of_dtype<JSPARSE_BFLOAT16>(params, to.keys, stream),
          "launch of a backward kernel");
  }
  if (a.schedule.num_split_rows == 0) return;
  auto add_up = [&](const Gradient &gradient) {
    check(launch_sum(params, gradient, to.keys ? a.kv_len : a.q_len, stream),
          "launch of the kernel that adds up parts");
  };
  for (const Gradient &gradient : to.gradients) add_up(gradient);
  if (to.by_key.whole != nullptr) add_up(to.by_key);
}

}  // namespace
}  // namespace jsparse

extern "C" int32_t jsparse_backward_walkers(int32_t keys, int32_t head_dim, int32_t block_rows,
                                            int32_t block_columns) {
  int dim = jsparse::kernel_head_dim(head_dim);
  if (!jsparse::has_backward_kernel(dim, block_rows, block_columns)) return 0;
  return jsparse::choose_backward(keys, dim, block_rows, block_columns).teams;
}

extern "C" int jsparse_backward_dq(const jsparse_backward_args *args, void *dq, float *part,
                                   void *dbias, void *stream, char *message, size_t message_size) {
  auto launch = [&] {
    auto of_queries = jsparse::gradient_of(*args, dq, part, args->scale);
    jsparse::backward(*args, {false, {of_queries}, dbias, {}}, static_cast<cudaStream_t>(stream));
  };
  return jsparse::report(launch, message, message_size);
}

extern "C" int jsparse_backward_dkv(const jsparse_backward_args *args, void *dk, void *dv,
                                    float *part_dk, float *part_dv, float *by_key,
                                    float *part_by_key, void *stream, char *message,
                                    size_t message_size) {
  auto launch = [&] {
    auto of_keys = jsparse::gradient_of(*args, dk, part_dk, args->scale);
    auto of_values = jsparse::gradient_of(*args, dv, part_dv, 1.0f);
    auto of_bias = jsparse::by_key_of(by_key, part_by_key);
    jsparse::backward(*args, {true, {of_keys, of_values}, nullptr, of_bias},
                      static_cast<cudaStream_t>(stream));
  };
  return jsparse::report(launch, message, message_size);
}

extern "C" int32_t jsparse_backward_tile(int32_t head_dim, int32_t block_q, int32_t block_kv) {
  int dim = jsparse::kernel_head_dim(head_dim);
  if (!jsparse::has_all_kernel(dim, block_q, block_kv)) return 0;
  return jsparse::choose_backward(true, dim, block_kv, block_q, false, true).tile;
}

extern "C" int jsparse_backward(const jsparse_backward_args *args, const jsparse_turns *turns, void *dq,
                                void *dk, void *dv, float *part_dk, float *part_dv, void *dbias,
                                void *stream, char *message, size_t message_size) {
  auto launch = [&] {
    auto of_keys = jsparse::gradient_of(*args, dk, part_dk, args->scale);
    auto of_values = jsparse::gradient_of(*args, dv, part_dv, 1.0f);
    if (turns->turns == nullptr) throw jsparse::Failure("turns is NULL; expected an array");
    jsparse::backward(*args, {true, {of_keys, of_values}, dbias, {}, *turns, dq},
                      static_cast<cudaStream_t>(stream));
  };
  return jsparse::report(launch, message, message_size);
}
