// The library of ffi/ on a CPU: the real handlers, load warps, compute warpgroups, element tests,
// softmax and stores, in a simulated CTA (simulated/): barriers, copies and products are played.
#include <mutex>

#include "collective/backward_load.cuh"
#include "collective/compute.cuh"
#include "collective/dkv.cuh"
#include "collective/dq.cuh"
#include "collective/gradients.cuh"
#include "collective/load.cuh"
#include "handlers.cc"

namespace jsparse {
namespace {

unsigned seed = 0;
std::mutex one_at_a_time;

// As forward_sm90, without what only a GPU has.
template <class Element, TileConfig kConfig>
void run(const ForwardParams &params) {
  using Storage = SharedStorage<Element, kConfig>;
  constexpr int kTeamThreads = 128 * kConfig.warpgroups();
  auto shared = std::make_unique<Storage>();
  for (int block = 0; block < params.args.schedule.num_workers / kConfig.walkers(); ++block) {
    simulated::Cta cta(seed + block);
    std::memset(static_cast<void *>(shared.get()), 0xff, sizeof(Storage));
    in_flight.clear();
    for (int t = 0; t < kConfig.teams; ++t) {
      auto &team = shared->team[t];
      int worker = kConfig.walker(block, t);
      team.init_barriers();
      cta.add(kConfig.teams * kTeamThreads + 32 * t,
              [&params, &team, t, worker] { Load<Element, kConfig>{params, team, t}.run(worker); });
      for (int thread = 0; thread < kTeamThreads; ++thread) {
        cta.add(t * kTeamThreads + thread, [&params, &shared, t, thread, worker] {
          Compute<Element, kConfig>{params, *shared, t, thread / 128, thread % 128}.run(worker);
        });
      }
    }
    cta.run();
  }
}

// As backward_sm90.
template <class Element, BackwardConfig kConfig>
void run(const BackwardParams &params) {
  using Storage = BackwardStorage<Element, kConfig>;
  using Compute =
      std::conditional_t<kConfig.keys, ComputeDkv<Element, kConfig>, ComputeDq<Element, kConfig>>;
  constexpr int kTeamThreads = 128 * kConfig.warpgroups();
  auto shared = std::make_unique<Storage[]>(kConfig.teams);
  for (int block = 0; block < params.args.schedule.num_workers / kConfig.teams; ++block) {
    simulated::Cta cta(seed + block);
    std::memset(static_cast<void *>(shared.get()), 0xff, kConfig.teams * sizeof(Storage));
    in_flight.clear();
    for (int t = 0; t < kConfig.teams; ++t) {
      auto &team = shared[t];
      int worker = kConfig.walker(block, t);
      team.init_barriers();
      cta.add(kConfig.teams * kTeamThreads + 32 * t,
              [&params, &team, worker] { BackwardLoad<Element, kConfig>{params, team}.run(worker); });
      for (int thread = 0; thread < kTeamThreads; ++thread) {
        cta.add(t * kTeamThreads + thread, [&params, &team, t, thread, worker] {
          Compute{{params, team, t, thread / 128, thread % 128}}.run(worker);
        });
      }
    }
    cta.run();
  }
}

// As backward_sm90, of all gradients: its CTAs wait for one another.
template <class Element, int kDim, bool kBias = false>
void run_all(const BackwardParams &params, void *dq) {
  constexpr BackwardConfig kConfig = choose_backward(true, kDim, 128, 128, kBias, true);
  using Storage = BackwardStorage<Element, kConfig>;
  constexpr int kThreads = kConfig.threads();
  const int ctas = params.args.schedule.num_workers;
  std::vector<std::unique_ptr<Storage>> shared;
  in_flight.clear();
  simulated::Cta cta(seed, kThreads);
  for (int block = 0; block < ctas; ++block) {
    auto &team = *shared.emplace_back(std::make_unique<Storage>());
    std::memset(static_cast<void *>(&team), 0xff, sizeof(Storage));
    team.init_barriers();
    auto add = [&](int thread, auto body) { cta.add(block * kThreads + thread, body); };
    add(256, [&params, &team, block] { BackwardLoad<Element, kConfig>{params, team}.run(block); });
    for (int w = 0; w < 2; ++w) {
      add(288 + 32 * w, [&params, &team, w, block] {
        SendDq<Element, kConfig>{params, team, w}.run(block);
      });
    }
    if constexpr (kBias) {
      if (params.bias_gradient != nullptr) {
        add(352, [&params, &team, block] { SendDs<Element, kConfig>{params, team}.run(block); });
      }
    }
    for (int thread = 0; thread < 256; ++thread) {
      add(thread, [&params, &team, thread, block] {
        ComputeGradients<Element, kConfig>{{{params, team, 0, thread / 128, thread % 128}}}.run(block);
      });
    }
  }
  cta.run();

  // As kernel/merge.cu.
  const jsparse_backward_args &args = params.args;
  int num_tiles = params.sizes.columns / kConfig.tile;
  for (int64_t place = 0; place < int64_t(args.batch) * args.num_heads * num_tiles; ++place) {
    simulated::Cta finish(seed);
    for (int thread = 0; thread < 256; ++thread) {
      finish.add(thread, [&, thread] {
        FinishDq<Element, kDim>{args, params.turns, dq}.run(place, num_tiles, thread);
      });
    }
    finish.run();
  }
}

template <class Element>
void run_of_dtype(const ForwardParams &params) {
  const jsparse_forward_args &args = params.args;
  auto of_block = [&]<int kDim, int kBiasSize>() {
    if constexpr (kBiasSize == 0) {
      if (args.share) return run<Element, choose(kDim, 64, 128, true)>(params);
    }
    if (args.tile_q == 64) return run<Element, choose(kDim, 64, 128, false, kBiasSize)>(params);
    if constexpr (has_kernel(kDim, 256, 128, false, kBiasSize)) {
      if (args.tile_q == 256) return run<Element, choose(kDim, 256, 128, false, kBiasSize)>(params);
    }
    if (args.block_kv == 64) return run<Element, choose(kDim, 128, 64, false, kBiasSize)>(params);
    return run<Element, choose(kDim, 128, 128, false, kBiasSize)>(params);
  };
  auto of_dim = [&]<int kBiasSize>() {
    const int dim = kernel_head_dim(args.head_dim);
    if (dim == 32) return of_block.template operator()<32, kBiasSize>();
    if (dim == 64) return of_block.template operator()<64, kBiasSize>();
    return of_block.template operator()<128, kBiasSize>();
  };
  if (args.bias.values == nullptr) return of_dim.template operator()<0>();
  return args.bias.dtype == JSPARSE_FLOAT32 ? of_dim.template operator()<4>()
                                            : of_dim.template operator()<2>();
}

template <class Element>
void run_of_dtype(const BackwardParams &params, bool keys) {
  auto of_blocks = [&]<bool kKeys, int kDim, bool kBias>() {
    bool low = params.sizes.block_rows == 64, narrow = params.sizes.block_columns == 64;
    if (low) return run<Element, choose_backward(kKeys, kDim, 64, 128, kBias)>(params);
    if (narrow) return run<Element, choose_backward(kKeys, kDim, 128, 64, kBias)>(params);
    return run<Element, choose_backward(kKeys, kDim, 128, 128, kBias)>(params);
  };
  auto of_pass = [&]<int kDim, bool kBias>() {
    return keys ? of_blocks.template operator()<true, kDim, kBias>()
                : of_blocks.template operator()<false, kDim, kBias>();
  };
  auto of_dim = [&]<int kDim>() {
    return params.args.bias.values == nullptr ? of_pass.template operator()<kDim, false>()
                                              : of_pass.template operator()<kDim, true>();
  };
  const int dim = kernel_head_dim(params.args.head_dim);
  if (dim == 32) return of_dim.template operator()<32>();
  if (dim == 64) return of_dim.template operator()<64>();
  return of_dim.template operator()<128>();
}

// As kernel/merge.cu.
template <class Element>
void sum_parts(const BackwardParams &params, const Gradient &gradient, int tokens) {
  const jsparse_schedule &schedule = params.args.schedule;
  const int block_rows = params.sizes.block_rows, dim = gradient.size;
  for (int64_t n = 0; n < int64_t(schedule.num_split_rows) * block_rows; ++n) {
    int64_t split = n / block_rows, in_block = n % block_rows;
    const int32_t *place = schedule.split_rows + 3 * split;
    int64_t token = place[2] * block_rows + in_block;
    if (token >= tokens) continue;
    int64_t row = (int64_t(place[0]) * tokens + token) * params.args.num_heads + place[1];
    for (int i = 0; i < dim; ++i) {
      float total = 0;
      for (int part = 0; part < schedule.most_parts; ++part) {
        int64_t slot = schedule.split_slots[split * schedule.most_parts + part];
        if (slot >= 0) total += gradient.part[(slot * block_rows + in_block) * dim + i];
      }
      static_cast<Element *>(gradient.whole)[row * dim + i] = Element(total);
    }
  }
}

template <class Element>
void merge(const jsparse_forward_args &args) {
  const jsparse_schedule &schedule = args.schedule;
  for (int64_t n = 0; n < int64_t(schedule.num_split_rows) * args.tile_q; ++n) {
    int64_t split = n / args.tile_q, in_tile = n % args.tile_q;
    const int32_t *place = schedule.split_rows + 3 * split;
    int token = place[2] * args.tile_q + int(in_tile);
    if (token >= args.q_len) continue;
    std::vector<int64_t> parts;
    float top = -INFINITY, total = 0;
    for (int part = 0; part < schedule.most_parts; ++part) {
      int slot = schedule.split_slots[split * schedule.most_parts + part];
      if (slot >= 0) parts.push_back(int64_t(slot) * args.tile_q + in_tile);
    }
    for (int64_t at : parts) top = fmaxf(top, args.part_lse[at]);
    if (top == -INFINITY) top = 0;
    for (int64_t at : parts) total += expf(args.part_lse[at] - top);
    int64_t head = int64_t(place[0]) * args.num_heads + place[1];
    args.lse[head * args.q_len + token] = top + logf(total);
    int64_t row = (int64_t(place[0]) * args.q_len + token) * args.num_heads + place[1];
    for (int i = 0; i < args.head_dim; ++i) {
      float sum = 0;
      for (int64_t at : parts) {
        sum += expf(args.part_lse[at] - top) * args.part_out[at * args.head_dim + i];
      }
      auto *out = static_cast<Element *>(args.out) + row * args.head_dim;
      out[i] = Element(total == 0 ? 0.0f : sum / total);
    }
  }
}

template <class Args>
CUtensorMap map_of(const Args &args, const void *array, int tokens, int heads,
                   int rows) {
  Map map{static_cast<const char *>(array), args.batch, tokens, heads, args.head_dim, rows,
          std::min(kernel_head_dim(args.head_dim), 64)};
  CUtensorMap opaque = {};
  std::memcpy(&opaque, &map, sizeof map);
  return opaque;
}

CUtensorMap map_of_bias(const jsparse_bias &bias, const void *values, int box_rows) {
  BiasMap map{static_cast<char *>(const_cast<void *>(values)), bias.dtype == JSPARSE_FLOAT32 ? 4 : 2,
              bias.rows, bias.columns, box_rows};
  CUtensorMap opaque = {};
  std::memcpy(&opaque, &map, sizeof map);
  return opaque;
}

// What `launch` returns, one launch at a time: 0, or 1 after what went wrong in a CTA.
template <class Launch>
int simulate(Launch launch, char *message, size_t message_size) {
  std::lock_guard lock(one_at_a_time);
  try {
    launch();
    return 0;
  } catch (const simulated::Failure &failure) {
    message[std::string(failure.what()).copy(message, message_size - 1)] = '\0';
    return 1;
  }
}

// Whether rows are keys, and where results go.
struct Outputs {
  bool keys;
  std::vector<Gradient> gradients;
  void *bias_gradient;
  Gradient by_key;
  jsparse_turns turns = {};
  void *dq = nullptr;
};

// As kernel/backward.cc.
template <class Element>
void backward(const jsparse_backward_args &args, const Outputs &to) {
  const auto &[keys, gradients, bias_gradient, by_key, turns, dq] = to;
  BackwardParams params = {};
  params.args = args;
  params.scale_log2 = args.scale * 1.4426950408889634f;
  params.sizes = keys ? block_sizes(args.block_kv, args.kv_len, args.block_q, args.q_len)
                      : block_sizes(args.block_q, args.q_len, args.block_kv, args.kv_len);
  params.first = gradients.front();
  params.second = gradients.back();
  params.inverse_scale = 1.0f / args.scale;
  params.bias_gradient = bias_gradient;
  params.by_key = by_key;
  params.turns = turns;
  params.bias = map_of_bias(args.bias, args.bias.values, 128);
  params.bias_gradient_map = map_of_bias(args.bias, bias_gradient, 64);
  const int dim = kernel_head_dim(args.head_dim);
  int tile = choose_backward(keys, dim, params.sizes.block_rows,
                             params.sizes.block_columns, false, dq != nullptr).tile;
  const void *of_queries[] = {args.q, args.dout}, *of_keys[] = {args.k, args.v};
  for (int i = 0; i < 2; ++i) {
    (keys ? params.columns : params.rows)[i] =
        map_of(args, of_queries[i], args.q_len, args.num_heads, keys ? tile : 64);
    (keys ? params.rows : params.columns)[i] =
        map_of(args, of_keys[i], args.kv_len, args.num_kv_heads, keys ? 64 : tile);
  }
  if (dq == nullptr) {
    run_of_dtype<Element>(params, keys);
  } else {
    std::memset(turns.taken, 0, sizeof(int32_t) * turns.num_sums);
    std::fill_n(turns.sums, int64_t(turns.num_sums) * tile * dim, __builtin_nanf(""));
    const bool bias = args.bias.values != nullptr;
    if (dim == 32) bias ? run_all<Element, 32, true>(params, dq) : run_all<Element, 32>(params, dq);
    if (dim == 64) bias ? run_all<Element, 64, true>(params, dq) : run_all<Element, 64>(params, dq);
    if (dim == 128) run_all<Element, 128>(params, dq);
  }
  for (const Gradient &gradient : gradients) {
    sum_parts<Element>(params, gradient, keys ? args.kv_len : args.q_len);
  }
  if (by_key.whole != nullptr) sum_parts<float>(params, by_key, args.kv_len);
}

int backward(const jsparse_backward_args &args, const Outputs &to, char *message,
             size_t message_size) {
  auto launch = [&] {
    if (args.dtype == JSPARSE_FLOAT16) return backward<cutlass::half_t>(args, to);
    return backward<cutlass::bfloat16_t>(args, to);
  };
  return simulate(launch, message, message_size);
}

}  // namespace
}  // namespace jsparse

extern "C" JSPARSE_API int32_t jsparse_forward_walkers(int32_t head_dim, int32_t tile_q,
                                                       int32_t block_kv, int32_t share,
                                                       int32_t bias_size) {
  const int dim = jsparse::kernel_head_dim(head_dim);
  return jsparse::choose(dim, tile_q, block_kv, share, bias_size).walkers();
}

// Threads of the CTAs that follow run in another order.
extern "C" JSPARSE_API void set_seed(unsigned seed) { jsparse::seed = seed; }

extern "C" JSPARSE_API int jsparse_forward(const jsparse_forward_args *args, void *, char *message,
                                           size_t message_size) {
  using namespace jsparse;
  ForwardParams params = {};
  params.args = *args;
  params.scale_log2 = args->scale * 1.4426950408889634f;
  params.sizes = block_sizes(args->block_q, args->q_len, args->block_kv, args->kv_len);
  params.inverse_scale = 1.0f / args->scale;
  const jsparse_bias &bias = args->bias;
  const int size = bias.dtype == JSPARSE_FLOAT32 ? 4 : 2, bias_size = bias.values == nullptr ? 0 : size;
  params.bias = map_of_bias(bias, bias.values, bias.rows == 1 ? 1 : args->tile_q);
  const int dim = kernel_head_dim(args->head_dim);
  int tile = choose(dim, args->tile_q, args->block_kv, args->share, bias_size).tile_kv;
  params.q = map_of(*args, args->q, args->q_len, args->num_heads, 64);
  params.k = map_of(*args, args->k, args->kv_len, args->num_kv_heads, tile);
  params.v = map_of(*args, args->v, args->kv_len, args->num_kv_heads, tile);
  auto launch = [&] {
    if (args->dtype == JSPARSE_FLOAT16) {
      run_of_dtype<cutlass::half_t>(params);
      merge<cutlass::half_t>(*args);
    } else {
      run_of_dtype<cutlass::bfloat16_t>(params);
      merge<cutlass::bfloat16_t>(*args);
    }
  };
  return simulate(launch, message, message_size);
}

extern "C" JSPARSE_API int32_t jsparse_backward_walkers(int32_t keys, int32_t head_dim,
                                                        int32_t block_rows,
                                                        int32_t block_columns) {
  const int dim = jsparse::kernel_head_dim(head_dim);
  return jsparse::choose_backward(keys, dim, block_rows, block_columns).teams;
}

extern "C" JSPARSE_API int jsparse_backward_dq(const jsparse_backward_args *args, void *dq,
                                               float *part, void *dbias, void *, char *message,
                                               size_t message_size) {
  auto of_queries = jsparse::gradient_of(*args, dq, part, args->scale);
  return jsparse::backward(*args, {false, {of_queries}, dbias, {}}, message, message_size);
}

extern "C" JSPARSE_API int jsparse_backward_dkv(const jsparse_backward_args *args, void *dk,
                                                void *dv, float *part_dk, float *part_dv,
                                                float *by_key, float *part_by_key, void *,
                                                char *message, size_t message_size) {
  auto of_keys = jsparse::gradient_of(*args, dk, part_dk, args->scale);
  auto of_values = jsparse::gradient_of(*args, dv, part_dv, 1.0f);
  auto of_bias = jsparse::by_key_of(by_key, part_by_key);
  return jsparse::backward(*args, {true, {of_keys, of_values}, nullptr, of_bias}, message,
                           message_size);
}

extern "C" JSPARSE_API int32_t jsparse_backward_tile(int32_t head_dim, int32_t block_q,
                                                     int32_t block_kv) {
  const int dim = jsparse::kernel_head_dim(head_dim);
  if (!jsparse::has_all_kernel(dim, block_q, block_kv)) return 0;
  return jsparse::choose_backward(true, dim, block_kv, block_q, false, true).tile;
}

extern "C" JSPARSE_API int jsparse_backward(const jsparse_backward_args *args,
                                            const jsparse_turns *turns, void *dq, void *dk,
                                            void *dv, float *part_dk, float *part_dv, void *dbias,
                                            void *, char *message, size_t message_size) {
  auto of_keys = jsparse::gradient_of(*args, dk, part_dk, args->scale);
  auto of_values = jsparse::gradient_of(*args, dv, part_dv, 1.0f);
  return jsparse::backward(*args, {true, {of_keys, of_values}, dbias, {}, *turns, dq}, message,
                           message_size);
}

extern "C" JSPARSE_API XLA_FFI_Error *jsparse_forward_on_host(XLA_FFI_CallFrame *);
extern "C" JSPARSE_API XLA_FFI_Error *jsparse_backward_dq_on_host(XLA_FFI_CallFrame *);
extern "C" JSPARSE_API XLA_FFI_Error *jsparse_backward_dkv_on_host(XLA_FFI_CallFrame *);
extern "C" JSPARSE_API XLA_FFI_Error *jsparse_backward_on_host(XLA_FFI_CallFrame *);

// The handlers without a stream, which a CPU does not have.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_forward_on_host,
    [](auto... arguments) { return jsparse::forward(nullptr, arguments...); },
    jsparse::of_forward(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_backward_dq_on_host,
    [](auto... arguments) { return jsparse::backward_dq(nullptr, arguments...); },
    jsparse::of_backward<3>(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_backward_dkv_on_host,
    [](auto... arguments) { return jsparse::backward_dkv(nullptr, arguments...); },
    jsparse::of_backward<6>(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_backward_on_host,
    [](auto... arguments) { return jsparse::backward(nullptr, arguments...); },
    jsparse::of_all_gradients(xla::ffi::Ffi::Bind()));

// 2^x by polynomial.
extern "C" JSPARSE_API void exp2_polynomial(const float *x, float *y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = jsparse::exp2_polynomial(x[i]);
}
