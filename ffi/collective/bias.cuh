// The bias of one step's logits. Over the scale, it is what the accumulator of q k^T starts from: so it
// takes no registers of its own, no place in shared memory and no additions.
#pragma once

#include <bit>
#include <type_traits>

#include "collective/element_mask.cuh"
#include "collective/softmax.cuh"
#include "collective/tiles.cuh"
#include "jsparse/types.h"

namespace jsparse {

// First byte of the rows and columns that the n-th block of an item has its bias in: those of its batch
// entry and head, or of the block itself.
__device__ inline int64_t bias_array(const jsparse_bias &bias, const Item &item, int n) {
  int64_t array = item.batch() / bias.inner % bias.entries * bias.heads;
  if (bias.heads > 1) array += item.head();
  if (bias.num_blocks > 0) {
    int number = n < item.num_partial()
                     ? bias.partial_numbers[item.first_partial() + n]
                     : bias.full_numbers[item.first_full() + n - item.num_partial()];
    array = array * bias.num_blocks + number;
  }
  return array * bias.rows * bias.columns * (bias.dtype == JSPARSE_FLOAT32 ? 4 : 2);
}

// Two neighbouring values as float32; at a multiple of their size.
template <class Value>
__device__ float2 load_pair(const Value *values) {
  if constexpr (cute::is_same_v<Value, float>) {
    return *reinterpret_cast<const float2 *>(values);
  } else if constexpr (cute::is_same_v<Value, cutlass::half_t>) {
    return __half22float2(*reinterpret_cast<const __half2 *>(values));
  } else {
    auto word = *reinterpret_cast<const uint32_t *>(values);
    return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
  }
}

template <class Value>
__device__ void store_pair(Value *values, float x, float y) {
  if constexpr (cute::is_same_v<Value, float>) {
    *reinterpret_cast<float2 *>(values) = make_float2(x, y);
  } else {
    *reinterpret_cast<uint32_t *>(values) = pack<Value>(x, y);
  }
}

// The part of a bias that a thread's elements of a step have; its place is that of the first of them.
struct BiasTile {
  const jsparse_bias &bias;
  int64_t array;  // from bias_array
  Place place;

  // Inlined, here and below: ptxas would wait for products at a call.
  //
  // The values times `factor`, where rows are queries. Those of a partial block may end before it does.
  template <bool kPartial, int kCount>
  __device__ __forceinline__ void load(float (&s)[kCount], float factor) const {
    switch (bias.dtype) {
      case JSPARSE_FLOAT16:
        return load<kPartial>(of<const cutlass::half_t>(bias.values), s, factor);
      case JSPARSE_BFLOAT16:
        return load<kPartial>(of<const cutlass::bfloat16_t>(bias.values), s, factor);
      default:
        return load<kPartial>(of<const float>(bias.values), s, factor);
    }
  }

  // The same where rows are keys.
  template <bool kPartial, int kCount>
  __device__ __forceinline__ void load_transposed(float (&s)[kCount], float factor) const {
    switch (bias.dtype) {
      case JSPARSE_FLOAT16:
        return load_transposed<kPartial>(of<const cutlass::half_t>(bias.values), s, factor);
      case JSPARSE_BFLOAT16:
        return load_transposed<kPartial>(of<const cutlass::bfloat16_t>(bias.values), s, factor);
      default:
        return load_transposed<kPartial>(of<const float>(bias.values), s, factor);
    }
  }

  // Writes values of the bias's dtype to `to`, an array like that of the bias, where rows are queries.
  template <bool kPartial, int kCount>
  __device__ __forceinline__ void store(const float (&s)[kCount], void *to) const {
    switch (bias.dtype) {
      case JSPARSE_FLOAT16:
        return store<kPartial>(of<cutlass::half_t>(to), s);
      case JSPARSE_BFLOAT16:
        return store<kPartial>(of<cutlass::bfloat16_t>(to), s);
      default:
        return store<kPartial>(of<float>(to), s);
    }
  }

 private:
  template <bool kPartial, class Value, int kCount>
  __device__ __forceinline__ void load(const Value *values, float (&s)[kCount],
                                       float factor) const {
    const int column = in_array(place.column, bias.columns);
    const int first = in_array(place.row, bias.rows);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Value *row = values + int64_t(min_of(first + 8 * half, bias.rows - 1)) * bias.columns;
      CUTE_UNROLL
      for (int i = 2 * half; i < kCount; i += 4) {
        int at = column + i / 4 * 8;
        float2 pair = {0.0f, 0.0f};
        if (!kPartial || at < bias.columns) pair = load_pair(row + at);
        s[i] = pair.x * factor;
        s[i + 1] = pair.y * factor;
      }
    }
  }

  template <bool kPartial, class Value, int kCount>
  __device__ __forceinline__ void load_transposed(const Value *values, float (&s)[kCount],
                                                  float factor) const {
    const int key = in_array(place.row, bias.columns);
    const int query = in_array(place.column, bias.rows);
    const int64_t row = bias.rows == 1 ? 0 : bias.columns;
    CUTE_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      CUTE_UNROLL
      for (int second = 0; second < 2; ++second) {
        const int nth = i / 4 * 8 + second;
        const Value *at = values + query * row + key + nth * row, *other = at + 8;
        if constexpr (kPartial) {
          const Value *clamped = values + min_of(query + nth, bias.rows - 1) * row;
          at = clamped + min_of(key, bias.columns - 1);
          other = clamped + min_of(key + 8, bias.columns - 1);
        }
        s[i + second] = float(*at) * factor;
        s[i + 2 + second] = float(*other) * factor;
      }
    }
  }

  template <bool kPartial, class Value, int kCount>
  __device__ __forceinline__ void store(Value *values, const float (&s)[kCount]) const {
    const int column = in_array(place.column, bias.columns);
    const int first = in_array(place.row, bias.rows);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (kPartial && first + 8 * half >= bias.rows) break;
      Value *row = values + int64_t(first + 8 * half) * bias.columns;
      CUTE_UNROLL
      for (int i = 2 * half; i < kCount; i += 4) {
        int at = column + i / 4 * 8;
        if (!kPartial || at < bias.columns) store_pair(row + at, s[i], s[i + 1]);
      }
    }
  }

  // Values of the array; `to` is const or not as Value is.
  template <class Value, class Void>
  __device__ Value *of(Void *to) const {
    using Byte = cute::conditional_t<std::is_const_v<Value>, const char, char>;
    return reinterpret_cast<Value *>(static_cast<Byte *>(to) + array);
  }

  // A row or column of a block, whose sizes are powers of two, or of all.
  __device__ int in_array(int at, int size) const {
    return bias.num_blocks > 0 ? at & (size - 1) : at;
  }

  __device__ static int min_of(int x, int y) { return x < y ? x : y; }
};

}  // namespace jsparse
