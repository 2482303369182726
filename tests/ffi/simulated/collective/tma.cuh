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
      bool exists = token + row < map.tokens;
      for (int i = 0; i < map.box_columns; ++i) {
        auto *place = static_cast<char *>(to) + swizzled(row, i, map.box_columns);
        exists ? (void)std::memcpy(place, from + 2 * i, 2) : (void)std::memset(place, 0, 2);
      }
    }
    full.arrive_bytes(map.box_rows * map.box_columns * 2);
  });
}

inline void copy_back(float *to, const float *from, uint32_t bytes) {
  simulated::cta->copy_later([=] { std::memcpy(to, from, bytes); });
}

inline void add_back(float *to, const float *from, uint32_t bytes) {
  simulated::cta->copy_later([=] {
    for (uint32_t i = 0; i < bytes / 4; ++i) to[i] += from[i];
  });
}

inline void await_read() { simulated::cta->await_copies(); }
inline void await_written() { simulated::cta->await_copies(); }

inline void await_turn(const int32_t *taken, int turn) {
  simulated::cta->wait_until([=] { return *taken == turn; });
}

inline void pass_turn(int32_t *taken, int turn) { *taken = turn + 1; }

}  // namespace jsparse
