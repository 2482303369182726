// The bias of one step's logits: in the forward kernel and in that of all gradients a tile in shared memory;
// in the other backward kernels, over the scale, what the accumulator of q k^T starts from, so that it
// takes no registers of its own, no place in shared memory and no additions.
#pragma once

#include <bit>
#include <type_traits>

#include "collective/element_mask.cuh"
#include "collective/products.cuh"
#include "collective/softmax.cuh"
#include "collective/tiles.cuh"
#include "jsparse/types.h"

namespace jsparse {

// Which of a bias's arrays an item has, of its batch entry and head: of rows and columns, or of blocks.
__device__ inline int bias_of_item(const jsparse_bias &bias, const Item &item) {
  int array = item.batch() / bias.inner % bias.entries * bias.heads;
  return bias.heads > 1 ? array + item.head() : array;
}

// Which array of rows and columns its n-th block has: that, or the block itself.
__device__ inline int bias_array(const jsparse_bias &bias, const Item &item, int of_item, int n) {
  if (bias.num_blocks == 0) return of_item;
  int number = n < item.num_partial()
                   ? bias.partial_numbers[item.first_partial() + n]
                   : bias.full_numbers[item.first_full() + n - item.num_partial()];
  return of_item * bias.num_blocks + number;
}

// From a row and a column of all to those of their array: of a block, whose sizes are powers of two, or of all.
__device__ inline void enter_array(const jsparse_bias &bias, int &row, int &column) {
  if (bias.num_blocks > 0) {
    row &= bias.rows - 1;
    column &= bias.columns - 1;
  }
}

// Two values of 16 bits as float32.
template <class Value>
__device__ float2 widen(uint32_t word) {
  if constexpr (cute::is_same_v<Value, cutlass::half_t>) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&word));
  } else {
    return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
  }
}

// Two neighbouring values as float32; at a multiple of their size.
template <class Value>
__device__ float2 load_pair(const Value *values) {
  if constexpr (cute::is_same_v<Value, float>) {
    return *reinterpret_cast<const float2 *>(values);
  } else {
    return widen<Value>(*reinterpret_cast<const uint32_t *>(values));
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

// A tile of a bias in shared memory, [kRows, kColumns]: boxes as wide as the swizzle, one after another. A
// thread has the elements of its logits, of the warp whose rows begin at `row`; of a bias by key, which has
// float32, there is one row.
template <class Value, int kRows, int kColumns, int kAhead>
struct SharedBias {
  static constexpr bool kMatrices = sizeof(Value) == 2;
  static constexpr int kUnit = 16 / sizeof(Value);  // values of what the swizzle exchanges
  static constexpr int kBoxColumns = 8 * kUnit;

  const char *tile;
  int row, lane;
  bool by_key;
  uint32_t ahead[kAhead > 0 ? 4 * kAhead : 1] = {};

  // Reads the first matrices, so that they are there when products have been waited for.
  __device__ void read_ahead() {
    if constexpr (kMatrices) {
      CUTE_UNROLL
      for (int n = 0; n < kAhead; ++n) load_matrices(ahead + 4 * n, matrix_row(n));
    }
  }

  // Adds `factor` times the values.
  __device__ __forceinline__ void add_to(float (&logits)[kColumns / 2], float factor) const {
    if constexpr (kMatrices) {
      CUTE_UNROLL
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t words[4];
        if (n >= kAhead) load_matrices(words, matrix_row(n));
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          add(&logits[8 * n + 2 * i], widen<Value>(n < kAhead ? ahead[4 * n + i] : words[i]), factor);
        }
      }
    } else {
      const int first = place(by_key ? 0 : row + first_row(lane), first_column(lane));
      const int eight_rows = by_key ? 0 : 8 * 128;
      CUTE_UNROLL
      for (int i = 0; i < kColumns / 2; i += 2) {
        const char *from = tile + beyond(first, i / 4 * 8) + (i >> 1 & 1) * eight_rows;
        add(&logits[i], load_pair(reinterpret_cast<const Value *>(from)), factor);
      }
    }
  }

 private:
  // What the lane names of the n-th four matrices, which are registers 0 to 7 of 16 columns.
  __device__ const char *matrix_row(int n) const {
    const MatrixRow at = left_row(lane);
    return tile + beyond(place(row + at.row, at.column), 16 * n);
  }

  __device__ static void add(float *logits, float2 values, float factor) {
    logits[0] = fmaf(values.x, factor, logits[0]);
    logits[1] = fmaf(values.y, factor, logits[1]);
  }

  // Where in the tile a value of the first two units of a row is, and one so many columns beyond it: a
  // multiple of two units.
  __device__ static int place(int row, int column) {
    return row * 128 + (column / kUnit ^ (row & 7)) * 16 + column % kUnit * int(sizeof(Value));
  }
  __device__ static int beyond(int first, int columns) {
    return (first ^ columns % kBoxColumns / kUnit * 16) + columns / kBoxColumns * kRows * 128;
  }
};

// A tile of 16-bit values in shared memory, [kQueries, 64 keys], where a thread's rows are keys: of the warp
// whose keys begin at `key`.
template <class Value, int kQueries>
struct SharedBiasByKey {
  const char *tile;
  int key, lane;

  // Adds `factor` times the values.
  __device__ __forceinline__ void add_to(float (&logits)[kQueries / 2], float factor) const {
    const MatrixRow at = right_row(lane);
    const char *first = tile + at.row * 128 + ((key + at.column) / 8 ^ (at.row & 7)) * 16;
    CUTE_UNROLL
    for (int n = 0; n < kQueries; n += 16) {
      uint32_t words[4];
      load_transposed_matrices(words, first + n * 128);
      CUTE_UNROLL
      for (int i = 0; i < 8; i += 2) {
        float2 pair = widen<Value>(words[i / 2]);
        logits[n / 2 + i] = fmaf(pair.x, factor, logits[n / 2 + i]);
        logits[n / 2 + i + 1] = fmaf(pair.y, factor, logits[n / 2 + i + 1]);
      }
    }
  }
};

struct NoBias {
  __device__ void read_ahead() const {}
  template <class Logits>
  __device__ void add_to(Logits &, float) const {}
};

// The part of a bias that a thread's elements of a step have, in global memory; its place is that of the
// first of them.
struct BiasTile {
  const jsparse_bias &bias;
  int array;  // from bias_array
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
    return static_cast<Value *>(to) + int64_t(array) * bias.rows * bias.columns;
  }

  // A row or column of a block, or of all, as above.
  __device__ int in_array(int at, int size) const {
    return bias.num_blocks > 0 ? at & (size - 1) : at;
  }

  __device__ static int min_of(int x, int y) { return x < y ? x : y; }
};

}  // namespace jsparse
