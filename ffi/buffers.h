// Buffers of an FFI call: their dtypes and shapes are checked before their data is used.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jsparse {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;

constexpr int64_t kAny = -1;  // in an expected shape

struct Refusal : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class Numbers>
std::string list(const Numbers &numbers) {
  std::string text;
  for (int64_t n : numbers) text += (text.empty() ? "" : ", ") + (n == kAny ? "any" : std::to_string(n));
  return "[" + text + "]";
}

inline std::string name_of(DataType type) {
  switch (type) {
    case DataType::F16:
      return "float16";
    case DataType::BF16:
      return "bfloat16";
    case DataType::F32:
      return "float32";
    case DataType::S32:
      return "int32";
    default:
      return "dtype number " + std::to_string(int(type));
  }
}

inline void expect_dtype(const std::string &name, AnyBuffer x, DataType expected) {
  if (x.element_type() == expected) return;
  throw Refusal(name + " is " + name_of(x.element_type()) + "; expected " + name_of(expected));
}

inline bool has_shape(AnyBuffer x, const std::vector<int64_t> &shape) {
  auto dims = x.dimensions();
  if (dims.size() != shape.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != kAny && shape[i] != dims[i]) return false;
  }
  return true;
}

// The data of a buffer that has the dtype and the shape.
template <DataType kType>
ffi::NativeType<kType> *data(const std::string &name, AnyBuffer x,
                             const std::vector<int64_t> &shape) {
  expect_dtype(name, x, kType);
  if (!has_shape(x, shape)) {
    throw Refusal(name + " has shape " + list(x.dimensions()) + "; expected " + list(shape));
  }
  return static_cast<ffi::NativeType<kType> *>(x.untyped_data());
}

// The same where no elements mean that there is no array.
template <DataType kType>
ffi::NativeType<kType> *optional(const std::string &name, AnyBuffer x,
                                 const std::vector<int64_t> &shape) {
  return x.element_count() == 0 ? nullptr : data<kType>(name, x, shape);
}

}  // namespace jsparse
