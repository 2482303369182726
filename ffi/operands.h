// What the handlers of the attention kernels share: operands and attributes, checked, as parts of the C
// interface's arguments.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "buffers.h"
#include "jsparse/types.h"

namespace jsparse {
namespace {

constexpr int kArraysOfRule[] = {2, 2, 2, 3};

// Sizes that jsparse_forward_args and jsparse_backward_args both have, 32 bits each, read off q, k and
// the attributes.
template <class Args>
Args sizes_of(AnyBuffer q, AnyBuffer k, int32_t block_q, int32_t block_kv) {
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
  auto of_q = q.dimensions(), of_k = k.dimensions();
  Args args = {};
  args.batch = int32_t(of_q[0]);
  args.q_len = int32_t(of_q[1]);
  args.num_heads = int32_t(of_q[2]);
  args.head_dim = int32_t(of_q[3]);
  args.kv_len = int32_t(of_k[1]);
  args.num_kv_heads = int32_t(of_k[2]);
  args.block_q = block_q;
  args.block_kv = block_kv;
  return args;
}

void expect_like(const std::string &name, AnyBuffer x, DataType dtype,
                 const std::vector<int64_t> &shape) {
  expect_dtype(name, x, dtype);
  if (has_shape(x, shape)) return;
  throw Refusal(name + " has shape " + list(x.dimensions()) + "; expected " + list(shape));
}

template <class Args>
void fill_inputs(Args &args, AnyBuffer q, AnyBuffer k, AnyBuffer v) {
  DataType dtype = q.element_type();
  if (dtype != DataType::F16 && dtype != DataType::BF16) {
    throw Refusal("q is " + name_of(dtype) + "; expected float16 or bfloat16");
  }
  args.dtype = dtype == DataType::F16 ? JSPARSE_FLOAT16 : JSPARSE_BFLOAT16;
  std::vector<int64_t> kv_shape = {args.batch, args.kv_len, args.num_kv_heads, args.head_dim};
  expect_like("k", k, dtype, kv_shape);
  expect_like("v", v, dtype, kv_shape);
  args.q = q.untyped_data();
  args.k = k.untyped_data();
  args.v = v.untyped_data();
}

// Rows and columns of a launch, and the heads that columns are of.
struct Grid {
  int32_t batch, rows, columns, block_rows, block_columns, column_heads;
};

int64_t whole(int64_t length, int64_t block) { return (length + block - 1) / block * block; }

// The operands that tell of the pattern.
struct Pattern {
  AnyBuffer partial, full, item_count, items, split_rows, split_slots, bad, lengths, bits;
};

jsparse_schedule schedule_of(const Pattern &x) {
  constexpr DataType kInt = DataType::S32;
  jsparse_schedule schedule = {};
  schedule.partial = data<kInt>("partial", x.partial, {kAny});
  schedule.full = data<kInt>("full", x.full, {kAny});
  schedule.item_count = data<kInt>("item_count", x.item_count, {kAny});
  schedule.num_workers = int32_t(x.item_count.dimensions()[0]);
  schedule.items =
      data<kInt>("items", x.items, {schedule.num_workers, kAny, JSPARSE_ITEM_FIELDS});
  schedule.items_per_worker = int32_t(x.items.dimensions()[1]);
  schedule.split_rows = data<kInt>("split_rows", x.split_rows, {kAny, 3});
  schedule.num_split_rows = int32_t(x.split_rows.dimensions()[0]);
  schedule.split_slots = data<kInt>("split_slots", x.split_slots, {schedule.num_split_rows, kAny});
  schedule.most_parts = int32_t(x.split_slots.dimensions()[1]);
  return schedule;
}

// Reads the arrays of the rules, in their order.
class Rules {
 public:
  Rules(const Grid &grid, ffi::RemainingArgs arrays)
      : arrays_(arrays),
        batch_(grid.batch),
        rows_(whole(grid.rows, grid.block_rows)),
        columns_(whole(grid.columns, grid.block_columns)) {}

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

jsparse_elements elements_of(const Grid &grid, const Pattern &x, ffi::Span<const int32_t> kinds,
                             ffi::RemainingArgs rule_arrays) {
  constexpr DataType kInt = DataType::S32;
  jsparse_elements elements = {};
  int64_t columns = whole(grid.columns, grid.block_columns);
  elements.bad = optional<kInt>("bad", x.bad, {grid.batch, grid.column_heads, columns});
  elements.lengths = optional<kInt>("lengths", x.lengths, {grid.batch, 2});
  elements.bits =
      optional<kInt>("bits", x.bits, {kAny, kAny, grid.block_rows, grid.block_columns / 32});
  if (elements.bits != nullptr) {
    int64_t entries = x.bits.dimensions()[0];
    if (entries != 1 && entries != grid.batch) {
      throw Refusal("bits has shape " + list(x.bits.dimensions()) + "; expected 1 or " +
                    std::to_string(grid.batch) + " first");
    }
    elements.bits_batched = entries > 1;
    elements.num_bits = int32_t(x.bits.dimensions()[1]);
  }
  if (kinds.size() > JSPARSE_MAX_RULES) {
    throw Refusal(std::to_string(kinds.size()) + " rules; expected at most " +
                  std::to_string(JSPARSE_MAX_RULES));
  }
  size_t expected = 0;
  Rules rules(grid, rule_arrays);
  for (int32_t kind : kinds) {
    elements.rules[elements.num_rules++] = rules.next(kind);
    expected += kArraysOfRule[kind];
  }
  if (rule_arrays.size() != expected) {
    throw Refusal(std::to_string(rule_arrays.size()) + " arrays of rules; expected " +
                  std::to_string(expected));
  }
  return elements;
}

// The operands that tell of a bias, and the batch entries one after another that share an entry of it.
struct BiasOperands {
  AnyBuffer values, partial_numbers, full_numbers;
  int32_t inner;
};

// Whether `size` is one of the two that an axis of a bias may have.
void expect_axis(const BiasOperands &x, size_t axis, int64_t full) {
  int64_t size = x.values.dimensions()[axis];
  if (size == 1 || size == full) return;
  throw Refusal("bias has shape " + list(x.values.dimensions()) + "; expected 1 or " +
                std::to_string(full) + " at axis " + std::to_string(axis));
}

int32_t bias_dtype(AnyBuffer values) {
  switch (values.element_type()) {
    case DataType::F16:
      return JSPARSE_FLOAT16;
    case DataType::BF16:
      return JSPARSE_BFLOAT16;
    case DataType::F32:
      return JSPARSE_FLOAT32;
    default:
      throw Refusal("bias is " + name_of(values.element_type()) +
                    "; expected float16, bfloat16 or float32");
  }
}

// `args` has its sizes.
template <class Args>
jsparse_bias bias_of(const Args &args, const Pattern &pattern, const BiasOperands &x) {
  constexpr DataType kInt = DataType::S32;
  jsparse_bias bias = {};
  if (x.values.element_count() == 0) return bias;
  auto dims = x.values.dimensions();
  if (dims.size() != 4 && dims.size() != 5) {
    throw Refusal("bias has shape " + list(dims) + "; expected 4 axes, or 5 of blocks");
  }
  for (int64_t size : dims) {
    if (size > INT32_MAX) {
      throw Refusal("bias has shape " + list(dims) + "; expected sizes up to 2147483647");
    }
  }
  if (x.inner < 1) {
    throw Refusal("bias_inner=" + std::to_string(x.inner) + "; expected at least 1");
  }
  expect_axis(x, 1, args.num_heads);
  bias.values = x.values.untyped_data();
  bias.dtype = jsparse_dtype(bias_dtype(x.values));
  bias.entries = int32_t(dims[0]);
  bias.inner = x.inner;
  bias.heads = int32_t(dims[1]);
  bias.rows = int32_t(dims[dims.size() - 2]);
  bias.columns = int32_t(dims[dims.size() - 1]);
  if (dims.size() == 4) {
    expect_axis(x, 2, args.q_len);
    const int unit = bias.dtype == JSPARSE_FLOAT32 ? 4 : 8;  // values of 16 bytes
    if (bias.columns < args.kv_len || bias.columns % unit != 0) {
      throw Refusal("bias has shape " + list(dims) + "; expected a multiple of " + std::to_string(unit) +
                    " as the last axis, at least " + std::to_string(args.kv_len));
    }
    return bias;
  }
  if (bias.rows != args.block_q || bias.columns != args.block_kv) {
    throw Refusal("bias has shape " + list(dims) + "; expected blocks of " +
                  std::to_string(args.block_q) + " x " + std::to_string(args.block_kv));
  }
  bias.num_blocks = int32_t(dims[2]);
  bias.partial_numbers = data<kInt>("partial_numbers", x.partial_numbers,
                                    {pattern.partial.dimensions()[0]});
  bias.full_numbers = data<kInt>("full_numbers", x.full_numbers, {pattern.full.dimensions()[0]});
  return bias;
}

}  // namespace
}  // namespace jsparse
