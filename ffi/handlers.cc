// The XLA FFI handler: checks buffers and attributes, and calls the C interface. No device code.
//
// Operands: q k v, kv_indices, full_kv_indices, item_count, items, split_rows, split_slots,
// bad_keys, lengths, bits, then the arrays of each rule; an array that is not needed is empty.
// Results: out, lse, part_out, part_lse. README.md has shapes and dtypes.
#include <cuda_runtime_api.h>

#include <string>
#include <utility>
#include <vector>

#include "buffers.h"
#include "jsparse/forward.h"

namespace jsparse {
namespace {

constexpr int kArraysOfRule[] = {2, 2, 2, 3};

// Sizes of a call, 32 bits each, read off q, k and the attributes.
jsparse_forward_args sizes_of(AnyBuffer q, AnyBuffer k, int32_t block_q, int32_t block_kv,
                              int32_t tile_q) {
  for (auto [name, x] : {std::pair("q", q), std::pair("k", k)}) {
    if (x.dimensions().size() != 4) {
      throw Refusal(std::string(name) + " has shape " + list(x.dimensions()) +
                    "; expected 4 axes: batch, tokens, heads, head size");
    }
    for (int64_t size : x.dimensions()) {
      if (size < 1 || size > INT32_MAX) {
        throw Refusal(std::string(name) + " has shape " + list(x.dimensions()) +
                      "; expected sizes from 1 to 2147483647");
      }
    }
  }
  if (block_q < 1 || block_kv < 1) {
    throw Refusal("blocks of " + std::to_string(block_q) + " x " + std::to_string(block_kv) +
                  "; expected 64 or 128 each");
  }
  if (tile_q != 64 && tile_q != block_q) {
    throw Refusal("tile_q=" + std::to_string(tile_q) + "; expected 64 or block_q");
  }
  auto of_q = q.dimensions(), of_k = k.dimensions();
  jsparse_forward_args args = {};
  args.batch = int32_t(of_q[0]);
  args.q_len = int32_t(of_q[1]);
  args.num_heads = int32_t(of_q[2]);
  args.head_dim = int32_t(of_q[3]);
  args.kv_len = int32_t(of_k[1]);
  args.num_kv_heads = int32_t(of_k[2]);
  args.block_q = block_q;
  args.block_kv = block_kv;
  args.tile_q = tile_q;
  return args;
}

int64_t whole(int64_t length, int64_t block) { return (length + block - 1) / block * block; }

// Reads the arrays of the rules, in their order.
class Rules {
 public:
  Rules(const jsparse_forward_args &args, ffi::RemainingArgs arrays)
      : arrays_(arrays),
        batch_(args.batch),
        rows_(whole(args.q_len, args.block_q)),
        columns_(whole(args.kv_len, args.block_kv)) {}

  jsparse_rule next(int32_t kind) {
    jsparse_rule rule = {};
    rule.kind = jsparse_rule_kind(kind);
    switch (kind) {
      case JSPARSE_SAME_LABEL:
        rule.first = take<DataType::S32>({rows_}, rule.first_batched);
        rule.second = take<DataType::S32>({columns_}, rule.second_batched);
        break;
      case JSPARSE_ROW_INTERVAL:
        rule.first = take<DataType::S32>({rows_}, rule.first_batched);
        rule.second = take<DataType::S32>({rows_}, rule.second_batched);
        break;
      case JSPARSE_COLUMN_INTERVAL:
        rule.first = take<DataType::S32>({columns_}, rule.first_batched);
        rule.second = take<DataType::S32>({columns_}, rule.second_batched);
        break;
      case JSPARSE_WITHIN:
        rule.first = take<DataType::F32>({3, rows_}, rule.first_batched);
        rule.second = take<DataType::F32>({3, columns_}, rule.second_batched);
        rule.third = take<DataType::F32>({}, rule.third_batched);
        break;
      default:
        throw Refusal("attribute rules has kind " + std::to_string(kind) + "; expected 0 to 3");
    }
    return rule;
  }

 private:
  // The next array, which has one entry or one for each batch entry.
  template <DataType kType>
  const ffi::NativeType<kType> *take(std::vector<int64_t> shape, int32_t &batched) {
    std::string name = "array " + std::to_string(taken_) + " of the rules";
    auto x = arrays_.get<AnyBuffer>(taken_++);
    if (x.has_error()) throw Refusal(name + " is missing: " + x.error().message());
    shape.insert(shape.begin(), 1);
    batched = !has_shape(*x, shape);
    shape.front() = batched ? batch_ : 1;
    return data<kType>(name, *x, shape);
  }

  ffi::RemainingArgs arrays_;
  int64_t batch_, rows_, columns_;
  size_t taken_ = 0;
};

struct Operands {
  AnyBuffer q, k, v, kv_indices, full_kv_indices, item_count, items, split_rows, split_slots,
      bad_keys, lengths, bits;
};

struct Results {
  AnyBuffer out, lse, part_out, part_lse;
};

void fill_arrays(jsparse_forward_args &args, const Operands &x) {
  DataType dtype = x.q.element_type();
  if (dtype != DataType::F16 && dtype != DataType::BF16) {
    throw Refusal("q is " + name_of(dtype) + "; expected float16 or bfloat16");
  }
  args.dtype = dtype == DataType::F16 ? JSPARSE_FLOAT16 : JSPARSE_BFLOAT16;
  std::vector<int64_t> kv_shape = {args.batch, args.kv_len, args.num_kv_heads, args.head_dim};
  for (auto [name, y] : {std::pair("k", x.k), std::pair("v", x.v)}) {
    expect_dtype(name, y, dtype);
    if (!has_shape(y, kv_shape)) {
      throw Refusal(std::string(name) + " has shape " + list(y.dimensions()) + "; expected " +
                    list(kv_shape));
    }
  }
  args.q = x.q.untyped_data();
  args.k = x.k.untyped_data();
  args.v = x.v.untyped_data();

  constexpr DataType kInt = DataType::S32;
  args.kv_indices = data<kInt>("kv_indices", x.kv_indices, {kAny});
  args.full_kv_indices = data<kInt>("full_kv_indices", x.full_kv_indices, {kAny});
  args.item_count = data<kInt>("item_count", x.item_count, {kAny});
  args.num_workers = int32_t(x.item_count.dimensions()[0]);
  args.items = data<kInt>("items", x.items, {args.num_workers, kAny, JSPARSE_ITEM_FIELDS});
  args.items_per_worker = int32_t(x.items.dimensions()[1]);
  args.split_rows = data<kInt>("split_rows", x.split_rows, {kAny, 3});
  args.num_split_rows = int32_t(x.split_rows.dimensions()[0]);
  args.split_slots = data<kInt>("split_slots", x.split_slots, {args.num_split_rows, kAny});
  args.most_parts = int32_t(x.split_slots.dimensions()[1]);

  int64_t columns = whole(args.kv_len, args.block_kv);
  args.bad_keys = optional<kInt>("bad_keys", x.bad_keys, {args.batch, args.num_kv_heads, columns});
  args.lengths = optional<kInt>("lengths", x.lengths, {args.batch, 2});
  args.bits = optional<kInt>("bits", x.bits,
                             {kAny, kAny, args.block_q, args.block_kv / 32});
  if (args.bits != nullptr) {
    int64_t entries = x.bits.dimensions()[0];
    if (entries != 1 && entries != args.batch) {
      throw Refusal("bits has shape " + list(x.bits.dimensions()) + "; expected 1 or " +
                    std::to_string(args.batch) + " first");
    }
    args.bits_batched = entries > 1;
    args.num_bits = int32_t(x.bits.dimensions()[1]);
  }
}

void fill_results(jsparse_forward_args &args, const Operands &x, const Results &y) {
  expect_dtype("out", y.out, x.q.element_type());
  if (!has_shape(y.out, {args.batch, args.q_len, args.num_heads, args.head_dim})) {
    throw Refusal("out has shape " + list(y.out.dimensions()) + "; expected that of q, " +
                  list(x.q.dimensions()));
  }
  args.out = y.out.untyped_data();
  constexpr DataType kFloat = DataType::F32;
  args.lse = data<kFloat>("lse", y.lse, {args.batch, args.num_heads, args.q_len});
  args.part_out = data<kFloat>("part_out", y.part_out, {kAny, args.tile_q, args.head_dim});
  int64_t slots = y.part_out.dimensions()[0];
  args.part_lse = data<kFloat>("part_lse", y.part_lse, {slots, args.tile_q});
}

void fill_rules(jsparse_forward_args &args, ffi::Span<const int32_t> kinds,
                ffi::RemainingArgs arrays) {
  if (kinds.size() > JSPARSE_MAX_RULES) {
    throw Refusal(std::to_string(kinds.size()) + " rules; expected at most " +
                  std::to_string(JSPARSE_MAX_RULES));
  }
  size_t expected = 0;
  Rules rules(args, arrays);
  for (int32_t kind : kinds) {
    args.rules[args.num_rules++] = rules.next(kind);
    expected += kArraysOfRule[kind];
  }
  if (arrays.size() != expected) {
    throw Refusal(std::to_string(arrays.size()) + " arrays of rules; expected " +
                  std::to_string(expected));
  }
}

ffi::Error forward(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer kv_indices,
                   AnyBuffer full_kv_indices, AnyBuffer item_count, AnyBuffer items,
                   AnyBuffer split_rows, AnyBuffer split_slots, AnyBuffer bad_keys,
                   AnyBuffer lengths, AnyBuffer bits, ffi::RemainingArgs rule_arrays,
                   ffi::Result<AnyBuffer> out, ffi::Result<AnyBuffer> lse,
                   ffi::Result<AnyBuffer> part_out, ffi::Result<AnyBuffer> part_lse,
                   int32_t block_q, int32_t block_kv, int32_t tile_q, bool share, float scale,
                   ffi::Span<const int32_t> rules) {
  Operands operands{q,     k,          v,           kv_indices, full_kv_indices, item_count,
                    items, split_rows, split_slots, bad_keys,   lengths,         bits};
  Results results{*out, *lse, *part_out, *part_lse};
  jsparse_forward_args args;
  try {
    args = sizes_of(q, k, block_q, block_kv, tile_q);
    args.share = share;
    args.scale = scale;
    fill_arrays(args, operands);
    fill_results(args, operands, results);
    fill_rules(args, rules, rule_arrays);
  } catch (const Refusal &refusal) {
    return ffi::Error::InvalidArgument(std::string("jsparse_forward: ") + refusal.what());
  }
  char message[512];
  if (jsparse_forward(&args, stream, message, sizeof message) != 0) {
    return ffi::Error::Internal(std::string("jsparse_forward: ") + message);
  }
  return ffi::Error::Success();
}

// What follows the context in a binding: the parameters of `forward` after the stream.
template <class Binding>
auto with_arguments(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // kv_indices
      .template Arg<AnyBuffer>()  // full_kv_indices
      .template Arg<AnyBuffer>()  // item_count
      .template Arg<AnyBuffer>()  // items
      .template Arg<AnyBuffer>()  // split_rows
      .template Arg<AnyBuffer>()  // split_slots
      .template Arg<AnyBuffer>()  // bad_keys
      .template Arg<AnyBuffer>()  // lengths
      .template Arg<AnyBuffer>()  // bits
      .RemainingArgs()            // of the rules
      .template Ret<AnyBuffer>()  // out
      .template Ret<AnyBuffer>()  // lse
      .template Ret<AnyBuffer>()  // part_out
      .template Ret<AnyBuffer>()  // part_lse
      .template Attr<int32_t>("block_q")
      .template Attr<int32_t>("block_kv")
      .template Attr<int32_t>("tile_q")
      .template Attr<bool>("share")
      .template Attr<float>("scale")
      .template Attr<ffi::Span<const int32_t>>("rules");
}

}  // namespace
}  // namespace jsparse

extern "C" JSPARSE_API XLA_FFI_Error *jsparse_forward_ffi(XLA_FFI_CallFrame *call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_forward_ffi, jsparse::forward,
    jsparse::with_arguments(xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
