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

template <class Element, int kDim, int kColumns>
struct Products {
  using T = Tiles<Element, kDim, kColumns>;
  static constexpr int kLogits = kColumns / 2, kSums = kDim / 2;

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

  static void start_pv(float (&sums)[kSums], uint32_t (&p)[kLogits / 2], Element *v_tile) {
    float *to = sums;
    const uint32_t *mine = p;
    in_flight[simulated::cta->index()].push_back([=] {
      auto *cta = simulated::cta;
      cta->shown[cta->index()] = mine;
      cta->meet_quad();
      int first = cta->index() / 4 * 4;
      for (int key = 0; key < kColumns; ++key) {
        auto *words = static_cast<const uint32_t *>(cta->shown[first + key % 8 / 2]);
        float values[2];
        for (int half = 0; half < 2; ++half) {
          Element both[2];
          std::memcpy(both, &words[key / 8 * 2 + half], 4);
          values[half] = float(both[key % 2]);
        }
        for (int i = 0; i < kSums; ++i) {
          to[i] += values[i >> 1 & 1] * element(v_tile, kColumns, key, column_of(i));
        }
      }
      cta->meet_quad();
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
  static int row_of(int i) { return first_row(simulated::cta->index() % 128) + 8 * (i >> 1 & 1); }
  static int column_of(int i) {
    return first_column(simulated::cta->index()) + i / 4 * 8 + i % 2;
  }

  // An element of a tile of `rows` rows.
  static float element(const Element *tile, int rows, int row, int column) {
    constexpr int kBox = T::kBoxColumns;
    auto *box = reinterpret_cast<const char *>(tile + column / kBox * rows * kBox);
    Element value;
    std::memcpy(&value, box + swizzled(row, column % kBox, kBox), 2);
    return float(value);
  }
};

}  // namespace jsparse
