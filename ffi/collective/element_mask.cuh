// Which elements of a partial block count, for the elements that one thread holds of a tile.
//
// A thread of a compute warpgroup holds rows r and r + 8 of 64, r = 16 * warp + lane / 4, and of
// each the columns 8 * j + 2 * (lane % 4) and the next. Its answers are the bits of words, one for
// 32 columns of a row: bit 8 * j and the next, as if the thread's first column were column 0.
#pragma once

#include <cute/tensor.hpp>

#include "collective/tiles.cuh"
#include "kernel/params.h"

namespace jsparse {

// The first row and column of a thread of a warpgroup in a 64-row accumulator.
__host__ __device__ constexpr int first_row(int thread) {
  return thread / 32 * 16 + thread % 32 / 4;
}
__host__ __device__ constexpr int first_column(int thread) { return thread % 4 * 2; }

// Where register i of the accumulator has its bit: word and position. Its row is r + 8 * (i >> 1 & 1).
__host__ __device__ constexpr int word_of(int i) { return i / 16; }
__host__ __device__ constexpr int bit_of(int i) { return i % 16 / 4 * 8 + i % 2; }

// The first row and column of a thread in the tile that its warpgroup computes.
struct Place {
  int batch;
  int row;
  int column;
};

// Bits of the columns before `end`, of 32 from `first` on.
__host__ __device__ constexpr uint32_t bits_before(int end, int first) {
  return end <= first ? 0 : end - first >= 32 ? 0xffffffff : (1u << (end - first)) - 1;
}

template <int kColumns>
struct ElementMask {
  static constexpr int kWords = kColumns / 32;
  static constexpr int kPairs = kColumns / 8;

  uint32_t words[2][kWords];

  // Everything counts.
  __device__ ElementMask() {
    CUTE_UNROLL
    for (int w = 0; w < kWords; ++w) words[0][w] = words[1][w] = 0xffffffff;
  }

  // Whether the element of register i counts.
  __device__ bool counts(int i) const {
    return words[i >> 1 & 1][word_of(i)] >> bit_of(i) & 1;
  }

  // `fill` where an element does not count.
  __device__ void apply(float (&s)[kColumns / 2], float fill) const {
    CUTE_UNROLL
    for (int i = 0; i < kColumns / 2; ++i) s[i] = counts(i) ? s[i] : fill;
  }

  // Lets only those elements count for which `allows(half, pair, column of the pair)` holds.
  template <class Allows>
  __device__ void restrict_to(Allows allows) {
    CUTE_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      auto of_pair = allows(pair);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t bit = 1u << (pair % 4 * 8 + i % 2);
        if (!of_pair(i / 2, i % 2)) words[i / 2][pair / 4] &= ~bit;
      }
    }
  }

  // Lets only those elements count whose column is in `interval(half)`, first and past the last.
  template <class Interval>
  __device__ void restrict_to_interval(const Place &place, Interval interval) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int2 ends = interval(half);
      CUTE_UNROLL
      for (int w = 0; w < kWords; ++w) {
        int first = place.column + 32 * w;
        words[half][w] &= bits_before(ends.y, first) & ~bits_before(ends.x, first);
      }
    }
  }
};

// The elements of one step that count.
template <int kColumns>
class ElementTest {
 public:
  using Mask = ElementMask<kColumns>;

  // `nth` is the number of the partial block.
  __device__ static Mask at(const jsparse_elements &elements, const BlockSizes &sizes,
                            const Place &place, int nth) {
    Mask mask;
    if (elements.bits != nullptr) read_bits(mask, elements, sizes, place, nth);
    if (elements.lengths != nullptr) {
      const int32_t *lengths = elements.lengths + 2 * int64_t(place.batch);
      int rows = lengths[0], columns = lengths[1];
      mask.restrict_to_interval(place, [=](int half) {
        return make_int2(0, place.row + 8 * half < rows ? columns : 0);
      });
    }
    for (int i = 0; i < elements.num_rules; ++i) apply_rule(mask, sizes, elements.rules[i], place);
    return mask;
  }

 private:
  // Both values of a pair of columns.
  template <class V, class Value>
  __device__ static V load_pair(const Value *first, int pair) {
    return *reinterpret_cast<const V *>(first + 8 * pair);
  }

  __device__ static void read_bits(Mask &mask, const jsparse_elements &elements,
                                   const BlockSizes &sizes, const Place &place, int nth) {
    int words = sizes.block_columns / 32, shift = place.column % 8;
    int64_t block = nth + (elements.bits_batched ? int64_t(place.batch) * elements.num_bits : 0);
    int64_t row = block * sizes.block_rows + (place.row & (sizes.block_rows - 1));
    auto *first = elements.bits + row * words + (place.column & (sizes.block_columns - 1)) / 32;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      CUTE_UNROLL
      for (int w = 0; w < Mask::kWords; ++w) {
        mask.words[half][w] = uint32_t(first[8 * half * words + w]) >> shift;
      }
    }
  }

  __device__ static void apply_rule(Mask &mask, const BlockSizes &sizes, const jsparse_rule &rule,
                                    const Place &place) {
    const int rows = sizes.rows, columns = sizes.columns;
    switch (rule.kind) {
      case JSPARSE_SAME_LABEL: {
        auto of_row = entry<int>(rule.first, rule.first_batched, place, rows) + place.row;
        auto of_column = entry<int>(rule.second, rule.second_batched, place, columns) + place.column;
        int label[2] = {of_row[0], of_row[8]};
        mask.restrict_to([&](int pair) {
          int2 other = load_pair<int2>(of_column, pair);
          return [=](int half, int second) { return label[half] == (second ? other.y : other.x); };
        });
        return;
      }
      case JSPARSE_ROW_INTERVAL: {
        auto of_row = entry<int>(rule.first, rule.first_batched, place, rows) + place.row;
        auto stop_of_row = entry<int>(rule.second, rule.second_batched, place, rows) + place.row;
        mask.restrict_to_interval(place, [=](int half) {
          return make_int2(of_row[8 * half], stop_of_row[8 * half]);
        });
        return;
      }
      case JSPARSE_COLUMN_INTERVAL: {
        auto starts = entry<int>(rule.first, rule.first_batched, place, columns) + place.column;
        auto stops = entry<int>(rule.second, rule.second_batched, place, columns) + place.column;
        mask.restrict_to([&](int pair) {
          int2 start = load_pair<int2>(starts, pair), stop = load_pair<int2>(stops, pair);
          return [=](int half, int second) {
            int row = place.row + 8 * half;
            return (second ? start.y : start.x) <= row && row < (second ? stop.y : stop.x);
          };
        });
        return;
      }
      case JSPARSE_WITHIN: {
        within(mask, rule, place, rows, columns);
        return;
      }
    }
  }

  // The squared distance in the order of operations that the other kernels use, so that all agree
  // on every pair.
  __device__ static void within(Mask &mask, const jsparse_rule &rule, const Place &place, int rows,
                                int columns) {
    auto of_row = entry<float>(rule.first, rule.first_batched, place, 3 * rows) + place.row;
    auto of_column =
        entry<float>(rule.second, rule.second_batched, place, 3 * columns) + place.column;
    float limit = rule.third[rule.third_batched ? place.batch : 0];
    float at[3][2];
    CUTE_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      at[axis][0] = of_row[axis * rows];
      at[axis][1] = of_row[axis * rows + 8];
    }
    mask.restrict_to([&](int pair) {
      float2 x = load_pair<float2>(of_column, pair);
      float2 y = load_pair<float2>(of_column + columns, pair);
      float2 z = load_pair<float2>(of_column + 2 * columns, pair);
      return [=](int half, int second) {
        float dx = at[0][half] - (second ? x.y : x.x);
        float dy = at[1][half] - (second ? y.y : y.x);
        float dz = at[2][half] - (second ? z.y : z.x);
        return fmaf(dz, dz, fmaf(dy, dy, dx * dx)) <= limit;
      };
    });
  }

  // The array of the place's batch entry.
  template <class Value>
  __device__ static const Value *entry(const void *array, int batched, const Place &place,
                                       int length) {
    return static_cast<const Value *>(array) + (batched ? int64_t(place.batch) * length : 0);
  }
};

}  // namespace jsparse
