// Writes 64 finished rows, or a part of them, from the registers of a warpgroup.
#pragma once

#include "collective/element_mask.cuh"
#include "collective/softmax.cuh"
#include "collective/tiles.cuh"

namespace jsparse {

// Transposes four words over the four lanes of a quad: lane t gets word t of lanes 0 to 3.
__device__ inline void transpose_quad(uint32_t (&w)[4], int lane) {
  CUTE_UNROLL
  for (int distance = 1; distance < 4; distance *= 2) {
    bool upper = lane & distance;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      uint32_t got =
          __shfl_xor_sync(0xffffffff, upper ? w[i] : w[i + distance], distance);
      (upper ? w[i] : w[i + distance]) = got;
    }
  }
}

// The first `size` columns of a row of the output in 16 bits. A lane holds two of each eight columns; four
// lanes together exchange them, so that each writes 16 bytes of the 64 that stand together.
template <class Element, int kSums>
__device__ void store_row(Element *row, int half, int lane, const float (&sums)[kSums],
                          float factor, int size) {
  CUTE_UNROLL
  for (int group = 0; group < kSums / 16; ++group) {
    uint32_t words[4];
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      int i = group * 16 + j * 4 + half * 2;
      words[j] = pack<Element>(sums[i] * factor, sums[i + 1] * factor);
    }
    transpose_quad(words, lane);
    int column = group * 32 + lane % 4 * 8;
    if (column < size) {
      *reinterpret_cast<uint4 *>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// The same of a part, in 32 bits.
template <int kSums>
__device__ void store_part_row(float *row, int half, int lane, const float (&sums)[kSums],
                               float factor, int size) {
  auto *pairs = reinterpret_cast<float2 *>(row) + lane % 4;
  CUTE_UNROLL
  for (int j = 0; j < kSums / 4; ++j) {
    int i = 4 * j + 2 * half;
    if (8 * j < size) pairs[4 * j] = make_float2(sums[i] * factor, sums[i + 1] * factor);
  }
}

// The result of an item: the rows themselves, or, of a split row, its part in the workspace.
template <class Element, int kSums>
__device__ void store(const jsparse_forward_args &args, const Item &item, int warpgroup, int thread,
                      const float (&sums)[kSums], const Softmax &softmax) {
  float inverse[2], lse[2];
  softmax.finish(inverse, lse);
  int in_tile = warpgroup * 64 + first_row(thread);
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half, in_tile += 8) {
    if (item.slot() >= 0) {
      int64_t at = int64_t(item.slot()) * args.tile_q + in_tile;
      if (thread % 4 == 0) args.part_lse[at] = lse[half];
      store_part_row(args.part_out + at * args.head_dim, half, thread, sums, inverse[half],
                     args.head_dim);
    } else {
      int token = item.row() * args.tile_q + in_tile;
      bool exists = token < args.q_len;
      int64_t head = int64_t(item.batch()) * args.num_heads + item.head();
      if (exists && thread % 4 == 0) args.lse[head * args.q_len + token] = lse[half];
      int64_t at = (int64_t(item.batch()) * args.q_len + token) * args.num_heads + item.head();
      store_row(static_cast<Element *>(args.out) + at * args.head_dim, half, thread, sums,
                inverse[half], exists ? args.head_dim : 0);
    }
  }
}

}  // namespace jsparse
