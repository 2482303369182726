// The XLA FFI handlers: they check buffers and attributes, and call the C interface. No device code.
//
// Operands: what a pass reads, then the pattern: partial, full, item_count, items, split_rows,
// split_slots, bad, lengths, bits; a bias and the numbers of the lists' blocks in it; for all gradients
// in one launch, turns, sums_of and bad_keys; and the arrays of each rule. An array that is not needed is
// empty.
// The headers of the C interface have shapes and dtypes.
#include <cuda_runtime_api.h>

#include <optional>

#include "jsparse/backward.h"
#include "jsparse/forward.h"
#include "kernel/head_dim.h"
#include "operands.h"

namespace jsparse {
namespace {

// What `call` returns, or the error that it found or that the C interface wrote to its message.
template <class Call>
ffi::Error guarded(const std::string &name, Call call) {
  char message[512];
  try {
    if (call(message, sizeof message) == 0) return ffi::Error::Success();
  } catch (const Refusal &refusal) {
    return ffi::Error::InvalidArgument(name + ": " + refusal.what());
  }
  return ffi::Error::Internal(name + ": " + message);
}

ffi::Error forward(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer partial,
                   AnyBuffer full, AnyBuffer item_count, AnyBuffer items, AnyBuffer split_rows,
                   AnyBuffer split_slots, AnyBuffer bad, AnyBuffer lengths, AnyBuffer bits,
                   AnyBuffer bias, AnyBuffer partial_numbers, AnyBuffer full_numbers,
                   ffi::RemainingArgs rule_arrays, ffi::Result<AnyBuffer> out,
                   ffi::Result<AnyBuffer> lse, ffi::Result<AnyBuffer> part_out,
                   ffi::Result<AnyBuffer> part_lse, int32_t block_q, int32_t block_kv,
                   int32_t tile_q, bool share, float scale, int32_t bias_inner,
                   ffi::Span<const int32_t> rules) {
  return guarded("jsparse_forward", [&](char *message, size_t size) {
    auto a = sizes_of<jsparse_forward_args>(q, k, block_q, block_kv);
    if (tile_q != 64 && tile_q != block_q && tile_q != 256) {
      throw Refusal("tile_q=" + std::to_string(tile_q) + "; expected 64, block_q or 256");
    }
    a.tile_q = tile_q;
    a.share = share;
    a.scale = scale;
    fill_inputs(a, q, k, v);
    Pattern pattern{partial,     full, item_count, items, split_rows,
                    split_slots, bad,  lengths,    bits};
    a.schedule = schedule_of(pattern);
    a.elements = elements_of({a.batch, a.q_len, a.kv_len, block_q, block_kv, a.num_kv_heads},
                             pattern, rules, rule_arrays);
    a.bias = bias_of(a, pattern, {bias, partial_numbers, full_numbers, bias_inner});
    if (a.bias.values != nullptr && a.bias.dtype != a.dtype && a.bias.dtype != JSPARSE_FLOAT32) {
      throw Refusal("bias is " + name_of(bias.element_type()) + "; expected " +
                    name_of(q.element_type()) + " or float32");
    }
    if (a.bias.values != nullptr && share) throw Refusal("share=1; expected 0 beside a bias");
    expect_like("out", *out, q.element_type(), {a.batch, a.q_len, a.num_heads, a.head_dim});
    a.out = out->untyped_data();
    constexpr DataType kFloat = DataType::F32;
    a.lse = data<kFloat>("lse", *lse, {a.batch, a.num_heads, a.q_len});
    a.part_out = data<kFloat>("part_out", *part_out, {kAny, tile_q, a.head_dim});
    a.part_lse = data<kFloat>("part_lse", *part_lse, {part_out->dimensions()[0], tile_q});
    return jsparse_forward(&a, stream, message, size);
  });
}

// What both backward passes read; rows are keys, or queries.
struct BackwardOperands {
  AnyBuffer q, k, v, dout, lse2, delta;
  Pattern pattern;
  std::optional<BiasOperands> bias;
  ffi::RemainingArgs rule_arrays;
  int32_t block_q, block_kv;
  float scale;
  ffi::Span<const int32_t> rules;
};

jsparse_backward_args args_of(const BackwardOperands &x, bool keys) {
  auto a = sizes_of<jsparse_backward_args>(x.q, x.k, x.block_q, x.block_kv);
  a.scale = x.scale;
  fill_inputs(a, x.q, x.k, x.v);
  expect_like("dout", x.dout, x.q.element_type(), {a.batch, a.q_len, a.num_heads, a.head_dim});
  a.dout = x.dout.untyped_data();
  std::vector<int64_t> shape = {a.batch, a.num_heads, whole(a.q_len, a.block_q)};
  a.lse2 = data<DataType::F32>("lse2", x.lse2, shape);
  a.delta = data<DataType::F32>("delta", x.delta, shape);
  Grid grid{a.batch, a.q_len, a.kv_len, a.block_q, a.block_kv, a.num_kv_heads};
  if (keys) grid = {a.batch, a.kv_len, a.q_len, a.block_kv, a.block_q, a.num_heads};
  a.schedule = schedule_of(x.pattern);
  a.elements = elements_of(grid, x.pattern, x.rules, x.rule_arrays);
  if (x.bias) a.bias = bias_of(a, x.pattern, *x.bias);
  return a;
}

// Where the gradient of a bias goes, or NULL if it is not asked for.
void *gradient_of_bias(AnyBuffer dbias, AnyBuffer bias) {
  if (dbias.element_count() == 0) return nullptr;
  auto dims = bias.dimensions();
  expect_like("dbias", dbias, bias.element_type(), {dims.begin(), dims.end()});
  return dbias.untyped_data();
}

ffi::Error backward_dq(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                       AnyBuffer lse2, AnyBuffer delta, AnyBuffer partial, AnyBuffer full,
                       AnyBuffer item_count, AnyBuffer items, AnyBuffer split_rows,
                       AnyBuffer split_slots, AnyBuffer bad, AnyBuffer lengths, AnyBuffer bits,
                       AnyBuffer bias, AnyBuffer partial_numbers, AnyBuffer full_numbers,
                       ffi::RemainingArgs rule_arrays, ffi::Result<AnyBuffer> dq,
                       ffi::Result<AnyBuffer> part, ffi::Result<AnyBuffer> dbias, int32_t block_q,
                       int32_t block_kv, float scale, int32_t bias_inner,
                       ffi::Span<const int32_t> rules) {
  return guarded("jsparse_backward_dq", [&](char *message, size_t size) {
    auto a = args_of({q, k, v, dout, lse2, delta,
                      {partial, full, item_count, items, split_rows, split_slots, bad, lengths, bits},
                      BiasOperands{bias, partial_numbers, full_numbers, bias_inner},
                      rule_arrays, block_q, block_kv, scale, rules},
                     false);
    expect_like("dq", *dq, q.element_type(), {a.batch, a.q_len, a.num_heads, a.head_dim});
    float *parts = data<DataType::F32>("part", *part, {kAny, block_q, a.head_dim});
    return jsparse_backward_dq(&a, dq->untyped_data(), parts, gradient_of_bias(*dbias, bias), stream,
                               message, size);
  });
}

// dk and dv like the keys and values, and their parts.
struct KeyGradients {
  void *dk, *dv;
  float *part_dk, *part_dv;
};

KeyGradients key_gradients(const jsparse_backward_args &a, DataType dtype, AnyBuffer dk, AnyBuffer dv,
                           AnyBuffer part_dk, AnyBuffer part_dv) {
  std::vector<int64_t> shape = {a.batch, a.kv_len, a.num_kv_heads, a.head_dim};
  expect_like("dk", dk, dtype, shape);
  expect_like("dv", dv, dtype, shape);
  shape = {kAny, a.block_kv, a.head_dim};
  return {dk.untyped_data(), dv.untyped_data(), data<DataType::F32>("part_dk", part_dk, shape),
          data<DataType::F32>("part_dv", part_dv, shape)};
}

ffi::Error backward_dkv(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                        AnyBuffer lse2, AnyBuffer delta, AnyBuffer partial, AnyBuffer full,
                        AnyBuffer item_count, AnyBuffer items, AnyBuffer split_rows,
                        AnyBuffer split_slots, AnyBuffer bad, AnyBuffer lengths, AnyBuffer bits,
                        AnyBuffer bias, AnyBuffer partial_numbers, AnyBuffer full_numbers,
                        ffi::RemainingArgs rule_arrays, ffi::Result<AnyBuffer> dk,
                        ffi::Result<AnyBuffer> dv, ffi::Result<AnyBuffer> part_dk,
                        ffi::Result<AnyBuffer> part_dv, ffi::Result<AnyBuffer> by_key,
                        ffi::Result<AnyBuffer> part_by_key, int32_t block_q, int32_t block_kv,
                        float scale, int32_t bias_inner, ffi::Span<const int32_t> rules) {
  return guarded("jsparse_backward_dkv", [&](char *message, size_t size) {
    auto a = args_of({q, k, v, dout, lse2, delta,
                      {partial, full, item_count, items, split_rows, split_slots, bad, lengths, bits},
                      BiasOperands{bias, partial_numbers, full_numbers, bias_inner},
                      rule_arrays, block_q, block_kv, scale, rules},
                     true);
    KeyGradients to = key_gradients(a, q.element_type(), *dk, *dv, *part_dk, *part_dv);
    constexpr DataType kFloat = DataType::F32;
    float *sums = optional<kFloat>("by_key", *by_key, {a.batch, a.kv_len, a.num_heads});
    std::vector<int64_t> shape = {part_dk->dimensions()[0], block_kv};
    float *sum_parts = optional<kFloat>("part_by_key", *part_by_key, shape);
    return jsparse_backward_dkv(&a, to.dk, to.dv, to.part_dk, to.part_dv, sums, sum_parts, stream,
                                message, size);
  });
}

ffi::Error backward(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                    AnyBuffer lse2, AnyBuffer delta, AnyBuffer partial, AnyBuffer full,
                    AnyBuffer item_count, AnyBuffer items, AnyBuffer split_rows,
                    AnyBuffer split_slots, AnyBuffer bad, AnyBuffer lengths, AnyBuffer bits,
                    AnyBuffer bias, AnyBuffer partial_numbers, AnyBuffer full_numbers,
                    AnyBuffer turns, AnyBuffer sums_of, AnyBuffer bad_keys,
                    ffi::RemainingArgs rule_arrays, ffi::Result<AnyBuffer> dq,
                    ffi::Result<AnyBuffer> dk, ffi::Result<AnyBuffer> dv,
                    ffi::Result<AnyBuffer> part_dk, ffi::Result<AnyBuffer> part_dv,
                    ffi::Result<AnyBuffer> sums, ffi::Result<AnyBuffer> taken,
                    ffi::Result<AnyBuffer> dbias, int32_t block_q, int32_t block_kv, float scale,
                    int32_t bias_inner, ffi::Span<const int32_t> rules) {
  return guarded("jsparse_backward", [&](char *message, size_t size) {
    auto a = args_of({q, k, v, dout, lse2, delta,
                      {partial, full, item_count, items, split_rows, split_slots, bad, lengths, bits},
                      BiasOperands{bias, partial_numbers, full_numbers, bias_inner},
                      rule_arrays, block_q, block_kv, scale, rules},
                     true);
    expect_like("dq", *dq, q.element_type(), {a.batch, a.q_len, a.num_heads, a.head_dim});
    KeyGradients to = key_gradients(a, q.element_type(), *dk, *dv, *part_dk, *part_dv);
    int32_t tile = jsparse_backward_tile(a.head_dim, block_q, block_kv);
    if (tile == 0) {
      throw Refusal("head size " + std::to_string(a.head_dim) + " with blocks of " +
                    std::to_string(block_q) + " x " + std::to_string(block_kv) +
                    "; expected a multiple of 8 up to 128 with blocks of 128 x 128");
    }
    constexpr DataType kInt = DataType::S32;
    jsparse_turns t = {};
    t.turns = data<kInt>("turns", turns, {kAny, 2});
    std::vector<int64_t> shape = {a.batch, a.num_heads, whole(a.q_len, block_q) / tile, 2};
    t.sums_of = data<kInt>("sums_of", sums_of, shape);
    t.sums = data<DataType::F32>("sums", *sums, {kAny, tile, kernel_head_dim(a.head_dim)});
    t.num_sums = int32_t(sums->dimensions()[0]);
    t.taken = data<kInt>("taken", *taken, {t.num_sums});
    shape = {a.batch, a.num_kv_heads, whole(a.kv_len, block_kv)};
    t.bad_keys = optional<kInt>("bad_keys", bad_keys, shape);
    return jsparse_backward(&a, &t, dq->untyped_data(), to.dk, to.dv, to.part_dk, to.part_dv,
                            gradient_of_bias(*dbias, bias), stream, message, size);
  });
}

// A binding with so many more operands or results.
template <int kCount, class Binding>
auto with_operands(Binding &&binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Arg<AnyBuffer>();
  } else {
    return with_operands<kCount - 1>(std::move(binding).template Arg<AnyBuffer>());
  }
}

template <int kCount, class Binding>
auto with_results(Binding &&binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Ret<AnyBuffer>();
  } else {
    return with_results<kCount - 1>(std::move(binding).template Ret<AnyBuffer>());
  }
}

// What follows the context in a binding: the parameters of the function after the stream.
template <class Binding>
auto of_forward(Binding &&binding) {
  return with_results<4>(with_operands<15>(std::move(binding)).RemainingArgs())
      .template Attr<int32_t>("block_q")
      .template Attr<int32_t>("block_kv")
      .template Attr<int32_t>("tile_q")
      .template Attr<bool>("share")
      .template Attr<float>("scale")
      .template Attr<int32_t>("bias_inner")
      .template Attr<ffi::Span<const int32_t>>("rules");
}

template <int kResults, class Binding>
auto of_backward(Binding &&binding) {
  return with_results<kResults>(with_operands<18>(std::move(binding)).RemainingArgs())
      .template Attr<int32_t>("block_q")
      .template Attr<int32_t>("block_kv")
      .template Attr<float>("scale")
      .template Attr<int32_t>("bias_inner")
      .template Attr<ffi::Span<const int32_t>>("rules");
}

template <class Binding>
auto of_all_gradients(Binding &&binding) {
  return with_results<8>(with_operands<21>(std::move(binding)).RemainingArgs())
      .template Attr<int32_t>("block_q")
      .template Attr<int32_t>("block_kv")
      .template Attr<float>("scale")
      .template Attr<int32_t>("bias_inner")
      .template Attr<ffi::Span<const int32_t>>("rules");
}

auto on_stream() { return xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(); }

}  // namespace
}  // namespace jsparse

extern "C" JSPARSE_API XLA_FFI_Error *jsparse_forward_ffi(XLA_FFI_CallFrame *call_frame);
extern "C" JSPARSE_API XLA_FFI_Error *jsparse_backward_dq_ffi(XLA_FFI_CallFrame *call_frame);
extern "C" JSPARSE_API XLA_FFI_Error *jsparse_backward_dkv_ffi(XLA_FFI_CallFrame *call_frame);
extern "C" JSPARSE_API XLA_FFI_Error *jsparse_backward_ffi(XLA_FFI_CallFrame *call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jsparse_forward_ffi, jsparse::forward,
                              jsparse::of_forward(jsparse::on_stream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jsparse_backward_dq_ffi, jsparse::backward_dq,
                              jsparse::of_backward<3>(jsparse::on_stream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jsparse_backward_dkv_ffi, jsparse::backward_dkv,
                              jsparse::of_backward<6>(jsparse::on_stream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jsparse_backward_ffi, jsparse::backward,
                              jsparse::of_all_gradients(jsparse::on_stream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
