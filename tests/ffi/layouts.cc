// Compares the layouts that the kernel's products use, which CuTe can evaluate on a CPU, with how
// TMA lays tiles out in shared memory and with which elements the kernel thinks a thread holds.
#include "collective/element_mask.cuh"
#include "collective/tiles.cuh"
#include "collective/tma.cuh"

namespace jsparse {
namespace {

using namespace cute;

// Where a TMA copy puts an element of a tile, in elements: boxes one after another.
template <class T>
int tma_offset(int rows, int row, int column) {
  constexpr int kBox = T::kBoxColumns;
  return column / kBox * rows * kBox + swizzled(row, column % kBox, kBox) / 2;
}

template <class T, int kColumns>
int tile_mismatches() {
  // Layouts of shared memory swizzle bytes; these, elements.
  auto q = as_position_independent_swizzle_layout(typename T::LayoutRows{});
  auto k = as_position_independent_swizzle_layout(typename T::LayoutColumns{});
  auto vt = as_position_independent_swizzle_layout(typename T::LayoutTransposed{});
  int wrong = 0;
  for (int column = 0; column < T::kDim; ++column) {
    for (int row = 0; row < 64; ++row) wrong += q(row, column) != tma_offset<T>(64, row, column);
    for (int key = 0; key < kColumns; ++key) {
      wrong += k(key, column) != tma_offset<T>(kColumns, key, column);
      wrong += vt(column, key) != tma_offset<T>(kColumns, key, column);
    }
  }
  return wrong;
}

// Whether register i of a thread is row r + 8 * (i >> 1 & 1), column c + 8 * (i / 4) + i % 2.
template <class Coordinates>
int register_mismatches(const Coordinates &held, int thread) {
  int wrong = 0;
  for (int i = 0; i < size(held); ++i) {
    wrong += get<0>(held(i)) != first_row(thread) + 8 * (i >> 1 & 1);
    wrong += get<1>(held(i)) != first_column(thread) + i / 4 * 8 + i % 2;
  }
  return wrong;
}

template <class T>
int register_mismatches() {
  typename T::MmaQk qk;
  typename T::MmaPv pv;
  typename T::MmaQkFromRegisters held;
  auto logits = make_identity_tensor(Shape<typename T::Rows, typename T::Columns>{});
  auto sums = make_identity_tensor(Shape<typename T::Rows, typename T::Dim>{});
  int wrong = 0;
  for (int thread = 0; thread < 128; ++thread) {
    wrong += register_mismatches(qk.get_slice(thread).partition_C(logits), thread);
    wrong += register_mismatches(pv.get_slice(thread).partition_C(sums), thread);
    wrong += register_mismatches(pv.get_slice(thread).partition_A(logits), thread);
    wrong += register_mismatches(held.get_slice(thread).partition_A(sums), thread);
  }
  return wrong;
}

// Whether 64 tokens of a tile that is one box are a tile of their own.
template <int kDim, int kColumns>
int part_mismatches() {
  using T = Tiles<cutlass::half_t, kDim, kColumns>;
  using Part = Tiles<cutlass::half_t, kDim, 64>;
  auto whole = as_position_independent_swizzle_layout(typename T::LayoutTransposed{});
  auto part = as_position_independent_swizzle_layout(typename Part::LayoutTransposed{});
  int wrong = 0;
  for (int token = 0; token < kColumns; ++token) {
    for (int i = 0; i < kDim; ++i) {
      wrong += whole(i, token) != token / 64 * 64 * kDim + part(i, token % 64);
    }
  }
  return wrong;
}

// The operands and results of dq from ds, which simulated/ plays: see DqProduct.
template <int kDim>
int dq_mismatches() {
  constexpr int kColumns = kDim < 64 ? kDim : 64;
  using Ds = Tiles<cutlass::half_t, 64, 64>;
  using Keys = Tiles<cutlass::half_t, kColumns, 64>;
  auto ds = as_position_independent_swizzle_layout(typename Ds::LayoutTransposed{});
  auto stored = as_position_independent_swizzle_layout(typename Ds::LayoutRows{});
  auto keys = as_position_independent_swizzle_layout(typename Keys::LayoutTransposed{});
  int wrong = 0;
  for (int key = 0; key < 64; ++key) {
    for (int i = 0; i < 64; ++i) {
      wrong += ds(i, key) != stored(key, i);
      wrong += stored(i, key) != i * 64 + ((key / 8) ^ (i % 8)) * 8 + key % 8;  // a box of a bias
    }
    for (int i = 0; i < kColumns; ++i) wrong += keys(i, key) != tma_offset<Keys>(64, key, i);
  }
  return wrong;
}

// Whether ldmatrix gives a thread the operand that mma.sync wants: its register j has two elements of a
// row of matrix j, which lanes 8 j to 8 j + 7 name.
template <class Held>
int matrix_mismatches(const Held &held, int thread, int first, MatrixRow (*named)(int)) {
  int wrong = 0;
  for (int i = 0; i < size(held); ++i) {
    auto [row, column] = named((first + i / 2) * 8 + thread / 4);
    wrong += get<0>(held(i)) != row;
    wrong += get<1>(held(i)) != column + thread % 4 * 2 + i % 2;
  }
  return wrong;
}

// The product of one warp, of whose right operands two are loaded together: see add_qk_of_warp.
int warp_mismatches() {
  auto mma = make_tiled_mma(SM80_16x8x16_F32F16F16F32_TN{});
  auto left = make_identity_tensor(Shape<_16, _16>{});
  auto right = make_identity_tensor(Shape<_16, _16>{});
  auto result = make_identity_tensor(Shape<_16, _8>{});
  int wrong = 0;
  for (int thread = 0; thread < 32; ++thread) {
    auto part = mma.get_slice(thread);
    auto b = part.partition_B(right);
    wrong += matrix_mismatches(part.partition_A(left), thread, 0, left_row);
    for (int n = 0; n < 2; ++n) wrong += matrix_mismatches(b(_, n, _), thread, 2 * n, right_row);
    wrong += register_mismatches(part.partition_C(result), thread);
  }
  return wrong;
}

// Whether transposed matrices, of queries by keys, are registers of a thread whose rows are keys.
int transposed_mismatches() {
  int wrong = 0;
  for (int thread = 0; thread < 32; ++thread) {
    for (int i = 0; i < 8; ++i) {
      auto [query, key] = right_row(i / 2 * 8 + thread % 4 * 2 + i % 2);
      wrong += query != first_column(thread) + i / 4 * 8 + i % 2;
      wrong += key + thread / 4 != first_row(thread) + 8 * (i >> 1 & 1);
    }
  }
  return wrong;
}

template <int kDim, int kColumns>
int mismatches() {
  using T = Tiles<cutlass::half_t, kDim, kColumns>;
  int wrong = tile_mismatches<T, kColumns>() + register_mismatches<T>();
  wrong += dq_mismatches<kDim>() + warp_mismatches() + transposed_mismatches();
  if constexpr (kDim <= 64) wrong += part_mismatches<kDim, kColumns>();
  return wrong;
}

}  // namespace
}  // namespace jsparse

// Elements that are not where the kernel takes them to be.
extern "C" JSPARSE_API int layout_mismatches(int head_dim, int columns) {
  using namespace jsparse;
  auto of_dim = [&]<int kDim>() {
    return columns == 64 ? mismatches<kDim, 64>() : mismatches<kDim, 128>();
  };
  if (head_dim == 32) return of_dim.template operator()<32>();
  if (head_dim == 64) return of_dim.template operator()<64>();
  return of_dim.template operator()<128>();
}
