// As ffi/collective/tma.cuh, for `simulated::Cta`. Tiles are swizzled as TMA does it.
#pragma once

#include <cuda.h>

#include <cstring>

#include "collective/barrier.cuh"

namespace jsparse {

// What a CUtensorMap holds here.
struct Map {
  const char *array;
  int batch, tokens, heads, dim, box_rows, box_columns;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// Byte of an element of a box, whose rows are as wide as the swizzle: the 16-byte units of a row are
// exchanged by an XOR with address bits 7 and up.
inline int swizzled(int row, int column, int box_columns) {
  int at = row * box_columns + column;
  return (at / 8 ^ (at / 64 % (box_columns / 8))) * 16 + at % 8 * 2;
}

inline void prefetch_map(const CUtensorMap &) {}

inline void copy_words(Barrier &full, void *to, const void *from, uint32_t bytes) {
  simulated::cta->copy_later([=, &full] {
    std::memcpy(to, from, bytes);
    full.arrive_bytes(bytes);
  });
}

inline void copy_box(const CUtensorMap &opaque, Barrier &full, void *to, int column, int head,
                     int token, int batch) {
  Map map;
  std::memcpy(&map, &opaque, sizeof map);
  simulated::cta->copy_later([=, &full] {
    for (int row = 0; row < map.box_rows; ++row) {
      int64_t at = int64_t(batch) * map.tokens + token + row;
      const char *from = map.array + ((at * map.heads + head) * map.dim + column) * 2;
      for (int i = 0; i < map.box_columns; ++i) {
        bool exists = token + row < map.tokens && column + i < map.dim;
        auto *place = static_cast<char *>(to) + swizzled(row, i, map.box_columns);
        exists ? (void)std::memcpy(place, from + 2 * i, 2) : (void)std::memset(place, 0, 2);
      }
    }
    full.arrive_bytes(map.box_rows * map.box_columns * 2);
  });
}

// As Map, of a bias.
struct BiasMap {
  char *array;
  int size, rows, columns, box_rows;
};
static_assert(sizeof(BiasMap) <= sizeof(CUtensorMap));

// Calls `use(place, in_array)` for the elements of a box: where they are in shared memory, and in the array,
// or NULL if they are not there.
template <class Use>
void for_box(const BiasMap &map, int column, int row, int array, Use use) {
  for (int i = 0; i < map.box_rows; ++i) {
    for (int j = 0; j < 128; j += map.size) {
      int at_row = row + i, at_column = column + j / map.size;
      bool exists = at_row < map.rows && at_column < map.columns;
      int64_t at = (int64_t(array) * map.rows + at_row) * map.columns + at_column;
      use(i * 128 + (j ^ i % 8 * 16), exists ? map.array + at * map.size : nullptr);
    }
  }
}

constexpr uint64_t kKeep = 0, kStream = 1;

inline void copy_box(const CUtensorMap &opaque, Barrier &full, void *to, int column, int row, int array,
                     uint64_t = kKeep) {
  BiasMap map;
  std::memcpy(&map, &opaque, sizeof map);
  simulated::cta->copy_later([=, &full] {
    for_box(map, column, row, array, [&](int place, char *in_array) {
      char *at = static_cast<char *>(to) + place;
      in_array ? (void)std::memcpy(at, in_array, map.size) : (void)std::memset(at, 0, map.size);
    });
    full.arrive_bytes(map.box_rows * 128);
  });
}

inline void copy_box_back(const CUtensorMap &opaque, const void *from, int column, int row, int array) {
  BiasMap map;
  std::memcpy(&map, &opaque, sizeof map);
  simulated::cta->store_later([=] {
    for_box(map, column, row, array, [&](int place, char *in_array) {
      if (in_array) std::memcpy(in_array, static_cast<const char *>(from) + place, map.size);
    });
  });
}

inline void copy_back(float *to, const float *from, uint32_t bytes) {
  simulated::cta->store_later([=] { std::memcpy(to, from, bytes); });
}

inline void add_back(float *to, const float *from, uint32_t bytes) {
  simulated::cta->store_later([=] {
    for (uint32_t i = 0; i < bytes / 4; ++i) to[i] += from[i];
  });
}

inline void await_read() { simulated::cta->await_stores(); }
inline void await_written() { simulated::cta->await_stores(); }

inline void await_turn(const int32_t *taken, int turn) {
  simulated::cta->wait_until([=] { return *taken == turn; });
}

inline void pass_turn(int32_t *taken, int turn) { *taken = turn + 1; }

}  // namespace jsparse
