// As ffi/collective/products.cuh, for `simulated::Cta`. A product reads its operands, p in registers
// too, and writes its results as late as it may: when it is waited for.
#pragma once

#include <array>
#include <deque>
#include <functional>

#include "collective/element_mask.cuh"
#include "collective/tiles.cuh"
#include "collective/tma.cuh"

namespace jsparse {

// Products that a thread has started.
inline std::map<int, std::deque<std::function<void()>>> in_flight;

// An element of a tile of `rows` rows, laid out as T is.
template <class T, class Element>
Element &element_of(Element *tile, int rows, int row, int column) {
  constexpr int kBox = T::kBoxColumns;
  auto *box = reinterpret_cast<char *>(tile + column / kBox * rows * kBox);
  return *reinterpret_cast<Element *>(box + swizzled(row, column % kBox, kBox));
}

// Two elements of a row of each of four matrices, or of a column.
template <bool kTransposed>
void read_matrices(uint32_t *to, const void *row) {
  auto *cta = simulated::cta;
  cta->shown[cta->index()] = row;
  cta->meet_warp();
  int lane = cta->index() % 32, first = cta->index() - lane;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      int row = lane / 4, column = lane % 4 * 2 + j;
      if (kTransposed) std::swap(row, column);
      auto *elements = static_cast<const char *>(cta->shown[first + 8 * i + row]);
      std::memcpy(reinterpret_cast<char *>(&to[i]) + 2 * j, elements + 2 * column, 2);
    }
  }
  cta->meet_warp();
}

inline void load_matrices(uint32_t *to, const void *row) { read_matrices<false>(to, row); }
inline void load_transposed_matrices(uint32_t *to, const void *row) { read_matrices<true>(to, row); }

template <class Element, int kDim, int kColumns>
struct Products {
  using T = Tiles<Element, kDim, kColumns>;
  static constexpr int kLogits = kColumns / 2, kSums = kDim / 2, kRowWords = kDim / 4;

  static void begin() {}
  static void begin(uint32_t (&)[kLogits / 2]) {}
  static void begin(float (&)[kSums], uint32_t (&)[kLogits / 2]) {}

  static void begin_onto(float (&)[kLogits]) {}

  template <bool kOnto = false>
  static void start_qk(float (&logits)[kLogits], Element *q_tile, Element *k_tile) {
    float *to = logits;
    std::array<float, kLogits> before = {};
    for (int i = 0; i < kLogits; ++i) {
      if (kOnto) before[i] = to[i];
      to[i] = __builtin_nanf("");
    }
    in_flight[simulated::cta->index()].push_back([=] {
      for (int i = 0; i < kLogits; ++i) {
        float sum = before[i];
        for (int column = 0; column < kDim; ++column) {
          sum += element(q_tile, 64, row_of(i), column) *
                 element(k_tile, kColumns, column_of(i), column);
        }
        to[i] = sum;
      }
    });
  }

  static void load_rows(uint32_t (&rows)[kRowWords], Element *tile, int thread) {
    for (int i = 0; i < kRowWords; ++i) {
      Element both[2];
      for (int j = 0; j < 2; ++j) {
        both[j] = Element(element(tile, 64, first_row(thread) + i % 2 * 8,
                                  first_column(thread) + i / 2 * 8 + j));
      }
      std::memcpy(&rows[i], both, 4);
    }
  }

  static void start_qk(float (&logits)[kLogits], uint32_t (&q)[kRowWords], Element *k_tile) {
    float *to = logits;
    for (int i = 0; i < kLogits; ++i) to[i] = __builtin_nanf("");
    const uint32_t *mine = q;
    in_flight[simulated::cta->index()].push_back([=] {
      for (int i = 0; i < kLogits; ++i) to[i] = 0;
      for_operand(mine, kDim, [=](int column, const float (&values)[2]) {
        for (int i = 0; i < kLogits; ++i) {
          to[i] += values[i >> 1 & 1] * element(k_tile, kColumns, column_of(i), column);
        }
      });
    });
  }

  static void add_qk_of_warp(float (&logits)[kLogits], Element *q_tile, Element *k_tile, int) {
    for (int i = 0; i < kLogits; ++i) {
      for (int column = 0; column < kDim; ++column) {
        logits[i] += element(q_tile, 64, row_of(i), column) * element(k_tile, kColumns, column_of(i), column);
      }
    }
    simulated::cta->meet_warp();
  }

  static void start_pv(float (&sums)[kSums], uint32_t (&p)[kLogits / 2], Element *v_tile) {
    float *to = sums;
    const uint32_t *mine = p;
    in_flight[simulated::cta->index()].push_back([=] {
      for_operand(mine, kColumns, [=](int key, const float (&values)[2]) {
        for (int i = 0; i < kSums; ++i) {
          to[i] += values[i >> 1 & 1] * element(v_tile, kColumns, key, column_of(i));
        }
      });
    });
  }

  template <int kPending, int kCount>
  static void wait(float (&)[kCount]) {
    auto &started = in_flight[simulated::cta->index()];
    while (started.size() > kPending) {
      started.front()();
      started.pop_front();
    }
    simulated::cta->meet_warp();
  }

 private:
  // A left operand in registers, of which the threads of a quad show theirs: the thread's two rows of
  // each of `size` columns.
  template <class Use>
  static void for_operand(const uint32_t *mine, int size, Use use) {
    auto *cta = simulated::cta;
    cta->shown[cta->index()] = mine;
    cta->meet_quad();
    int first = cta->index() / 4 * 4;
    for (int column = 0; column < size; ++column) {
      auto *words = static_cast<const uint32_t *>(cta->shown[first + column % 8 / 2]);
      float values[2];
      for (int half = 0; half < 2; ++half) {
        Element both[2];
        std::memcpy(both, &words[column / 8 * 2 + half], 4);
        values[half] = float(both[column % 2]);
      }
      use(column, values);
    }
    cta->meet_quad();
  }

  static float element(Element *tile, int rows, int row, int column) {
    return float(element_of<T>(tile, rows, row, column));
  }

  static int row_of(int i) { return first_row(simulated::cta->index() % 128) + 8 * (i >> 1 & 1); }
  static int column_of(int i) {
    return first_column(simulated::cta->index()) + i / 4 * 8 + i % 2;
  }
};

template <class Element, int kDim, bool kRowsOfQueries = false>
struct DqProduct {
  static constexpr int kColumns = kDim < 64 ? kDim : 64, kSums = kColumns / 2, kTile = 64 * 64;
  using T = Tiles<Element, 64, 64>;
  using Keys = Tiles<Element, kColumns, 64>;

  static void store_ds(Element *tile, uint32_t (&ds)[16], int thread) {
    for (int i = 0; i < 16; ++i) {
      Element both[2];
      std::memcpy(both, &ds[i], 4);
      for (int j = 0; j < 2; ++j) {
        int key = first_row(thread) + i % 2 * 8, query = first_column(thread) + i / 2 * 8 + j;
        element(tile, key, query) = both[j];
      }
    }
  }

  static Element &element(Element *tile, int key, int query) {
    return kRowsOfQueries ? element_of<T>(tile, 64, query, key) : element_of<T>(tile, 64, key, query);
  }

  static void start(float (&dq)[kSums], Element *tiles, Element *k, int k_stride) {
    float *to = dq;
    for (int i = 0; i < kSums; ++i) to[i] = __builtin_nanf("");
    in_flight[simulated::cta->index()].push_back([=] {
      int thread = simulated::cta->index() % 128;
      for (int i = 0; i < kSums; ++i) {
        int query = first_row(thread) + 8 * (i >> 1 & 1), dim = first_column(thread) + i / 4 * 8 + i % 2;
        to[i] = 0;
        for (int key = 0; key < 128; ++key) {
          to[i] += float(element(tiles + key / 64 * kTile, key % 64, query)) *
                   float(element_of<Keys>(k + key / 64 * k_stride, 64, key % 64, dim));
        }
      }
    });
  }
};

}  // namespace jsparse
