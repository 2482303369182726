// How tiles lie in shared memory, which products read them, and what one team shares.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include "collective/barrier.cuh"
#include "jsparse/types.h"
#include "kernel/tile_config.h"

namespace jsparse {

template <jsparse_dtype kDtype>
using ElementOf =
    cute::conditional_t<kDtype == JSPARSE_FLOAT16, cutlass::half_t, cutlass::bfloat16_t>;

// Tiles of 64 rows and of kColumns columns, each a token of kDim elements.
template <class Element, int kHeadDim, int kColumns>
struct Tiles {
  static constexpr int kDim = kHeadDim;
  // Columns of one TMA box: a row of them is as wide as the swizzle. A tile is its boxes one after
  // another, each [rows, kBoxColumns], which is also how the layouts below order their atoms.
  static constexpr int kBoxColumns = kDim < 64 ? kDim : 64;
  static constexpr bool kNarrow = kBoxColumns == 32;

  using KMajor = cute::conditional_t<kNarrow, cute::GMMA::Layout_K_SW64_Atom<Element>,
                                     cute::GMMA::Layout_K_SW128_Atom<Element>>;
  using MnMajor = cute::conditional_t<kNarrow, cute::GMMA::Layout_MN_SW64_Atom<Element>,
                                      cute::GMMA::Layout_MN_SW128_Atom<Element>>;

  using Rows = cute::Int<64>;
  using Columns = cute::Int<kColumns>;
  using Dim = cute::Int<kDim>;

  using LayoutRows = decltype(cute::tile_to_shape(KMajor{}, cute::Shape<Rows, Dim>{}));
  using LayoutColumns = decltype(cute::tile_to_shape(KMajor{}, cute::Shape<Columns, Dim>{}));
  // The same tile of columns, seen as the transposed operand of p v.
  using LayoutTransposed = decltype(cute::tile_to_shape(MnMajor{}, cute::Shape<Dim, Columns>{},
                                                        cute::Step<cute::_2, cute::_1>{}));

  // s = q k^T, also with q in registers, and out += p v with p in registers; of one warpgroup.
  using MmaQk = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Rows, Columns, Dim>>()));
  using MmaQkFromRegisters = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Rows, Columns, Dim>>()));
  using MmaPv = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<Rows, Dim, Columns>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  static constexpr uint32_t kRowBytes = 64 * kDim * sizeof(Element);  // of one warpgroup
  static constexpr uint32_t kColumnBytes = kColumns * kDim * sizeof(Element);
};

// The row, of 8 elements, that a lane names to ldmatrix or stmatrix in a tile of 16 x 16, so that its four
// matrices are a left operand; or right operands of mma.sync, of 8 columns each.
struct MatrixRow {
  int row, column;
};
__host__ __device__ constexpr MatrixRow left_row(int lane) { return {lane % 16, lane / 16 * 8}; }
__host__ __device__ constexpr MatrixRow right_row(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8};
}

// Zeros for a token of a tile of `rows` tokens. The swizzle moves nothing out of a row of a box.
template <class T, class Element>
__device__ void clear_token(Element *tile, int rows, int token) {
  for (int column = 0; column < T::kDim; column += T::kBoxColumns) {
    auto *row = reinterpret_cast<uint4 *>(tile + column * rows + token * T::kBoxColumns);
    for (int i = 0; i < T::kBoxColumns / 8; ++i) row[i] = make_uint4(0, 0, 0, 0);
  }
}

// The number of a block in a list entry.
__device__ inline int block_of(int entry) { return entry & (JSPARSE_FLAGGED_ROW - 1); }

// The place of the n-th 16 bytes of a token's row in a box of T.
template <class T, class Element>
__device__ uint4 *place_in_box(Element *box, int token, int n) {
  constexpr int kUnits = T::kBoxColumns / 8;
  int at = token * kUnits + n;
  return reinterpret_cast<uint4 *>(box) + (at ^ (at / 8 % kUnits));
}

// What a step adds to its logits.
template <TileConfig kConfig>
struct BiasTiles {
  alignas(1024) char tile[kConfig.num_stages][kConfig.tile_q * kConfig.tile_kv * kConfig.bias_size];
};
struct NoBiasTiles {};

// Of one team. A stage has the keys of a step and the values of the step before. Barriers named full are
// completed by the load warp and its copies, those named free by every warp that computes; q_free by
// every thread of theirs.
template <class Element, TileConfig kConfig>
struct alignas(1024) TeamStorage {
  alignas(1024) Element q[kConfig.num_q_stages][kConfig.warpgroups()][64 * kConfig.head_dim];
  alignas(1024) Element k[kConfig.num_stages][kConfig.tile_kv * kConfig.head_dim];
  alignas(1024) Element v[kConfig.num_stages][kConfig.tile_kv * kConfig.head_dim];
  // The item of each query tile and the list entry of each key tile, put there by the load warp.
  alignas(16) int32_t item[kConfig.num_q_stages][JSPARSE_ITEM_FIELDS];
  int32_t entry[kConfig.num_stages];
  Barrier q_full[kConfig.num_q_stages];
  Barrier full[kConfig.num_stages];
  Barrier q_free[kConfig.num_q_stages];
  Barrier free[kConfig.num_stages];
  cute::conditional_t<(kConfig.bias_size > 0), BiasTiles<kConfig>, NoBiasTiles> bias;

  __device__ void init_barriers() {
    constexpr int kWarps = 4 * kConfig.warpgroups();
    for (int i = 0; i < kConfig.num_q_stages; ++i) {
      q_full[i].init(1);
      q_free[i].init(32 * kWarps);
    }
    for (int i = 0; i < kConfig.num_stages; ++i) {
      full[i].init(1);
      free[i].init(kWarps);
    }
  }
};

template <class Element, TileConfig kConfig>
struct SharedStorage {
  TeamStorage<Element, kConfig> team[kConfig.teams];
  // Where teams compute items together, what each but the first found: every thread's sums, and
  // for its two rows the maximum and the sum of probabilities.
  static constexpr int kOthers = kConfig.share ? kConfig.teams - 1 : 1;
  static constexpr int kFound = kConfig.share ? kConfig.head_dim / 2 + 4 : 1;
  float found[kOthers][kFound][128];
};

// A position in a ring of stages: which stage it is, and the parity of the phase that fills it.
template <int kStages>
struct Position {
  uint32_t count = 0;

  __device__ int stage() const { return count % kStages; }
  __device__ uint32_t parity() const { return count / kStages % 2; }
  __device__ Position plus(int steps) const { return {count + steps}; }
};

// The fields of an item; see jsparse_schedule. They are read where they are used: registers are too
// dear to keep them.
struct Item {
  const int32_t *fields;

  __device__ int batch() const { return fields[0]; }
  __device__ int head() const { return fields[1]; }
  __device__ int row() const { return fields[2]; }
  __device__ int first_partial() const { return fields[3]; }
  __device__ int num_partial() const { return fields[4]; }
  __device__ int first_full() const { return fields[5]; }
  __device__ int num_blocks() const { return fields[4] + fields[6]; }
  __device__ int slot() const { return fields[7]; }
  __device__ int first_bits() const { return fields[8]; }
  __device__ int first_column() const { return fields[9]; }
  __device__ int first_turn() const { return fields[10]; }
  // Position in its list of the n-th of `count` blocks of a kind.
  __device__ int round(int n, int count) const {
    int at = n + int(uint32_t(fields[11]) * count >> 16);
    return at < count ? at : at - count;
  }
};

// List entry of the n-th block of an item: partial blocks first, then full ones.
__device__ inline int entry_of(const jsparse_schedule &schedule, const Item &item, int n) {
  if (n < item.num_partial()) return schedule.partial[item.first_partial() + n];
  // A full block has no flag, so that the item itself tells the first one.
  if (n == 0) return item.first_column();
  return schedule.full[item.first_full() + n - item.num_partial()];
}

// The same of lists that are walked round: which block is the n-th, and its entry.
__device__ inline int round_of(const Item &item, int n) {
  int partial = item.num_partial();
  if (n < partial) return item.round(n, partial);
  return partial + item.round(n - partial, item.num_blocks() - partial);
}
__device__ inline int entry_round(const jsparse_schedule &schedule, const Item &item, int n) {
  n = round_of(item, n);
  if (n < item.num_partial()) return schedule.partial[item.first_partial() + n];
  return schedule.full[item.first_full() + n - item.num_partial()];
}

}  // namespace jsparse
