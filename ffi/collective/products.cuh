// The products of one warpgroup on the tensor core (wgmma), by CuTe: started in order, each a group
// of its own, and waited for one by one.
#pragma once

#include <cute/tensor.hpp>

#include "collective/tiles.cuh"

namespace jsparse {

// Four matrices of 8 x 8 elements of 16 bits, whose rows the lanes of a warp name: each gets two elements of
// a row of each.
__device__ inline void load_matrices(uint32_t *to, const void *row) {
  auto *words = static_cast<const cute::uint128_t *>(row);
  cute::SM75_U32x4_LDSM_N::copy(*words, to[0], to[1], to[2], to[3]);
}

// The same of matrices that are transposed: two elements of a column of each.
__device__ inline void load_transposed_matrices(uint32_t *to, const void *row) {
  auto *words = static_cast<const cute::uint128_t *>(row);
  cute::SM75_U16x8_LDSM_T::copy(*words, to[0], to[1], to[2], to[3]);
}

template <class Element, int kDim, int kColumns>
struct Products {
  using T = Tiles<Element, kDim, kColumns>;
  static constexpr int kLogits = kColumns / 2;  // registers of a tile of logits
  static constexpr int kSums = kDim / 2;        // registers of the sums
  static constexpr int kRowWords = kDim / 4;    // registers of a tile of rows

  // Orders what was written to the registers of the products that follow.
  __device__ static void begin() { cute::warpgroup_arrive(); }
  __device__ static void begin(uint32_t (&p)[kLogits / 2]) {
    hold(p);
    cute::warpgroup_arrive();
  }
  __device__ static void begin(float (&sums)[kSums], uint32_t (&p)[kLogits / 2]) {
    hold(sums);
    begin(p);
  }

  // Orders what was written to logits that the product of these tiles shall be added to.
  __device__ static void begin_onto(float (&logits)[kLogits]) { hold(logits); }

  // logits = q k^T, or += where they are begun onto; they may be read after a wait.
  template <bool kOnto = false>
  __device__ static void start_qk(float (&logits)[kLogits], Element *q_tile, Element *k_tile) {
    using namespace cute;
    typename T::MmaQk mma;
    auto part = mma.get_slice(0);
    auto q = make_tensor(make_smem_ptr(q_tile), typename T::LayoutRows{});
    auto k = make_tensor(make_smem_ptr(k_tile), typename T::LayoutColumns{});
    auto a = part.make_fragment_A(part.partition_A(q));
    auto b = part.make_fragment_B(part.partition_B(k));
    auto shape = Shape<typename T::Rows, typename T::Columns>{};
    auto c = make_tensor(&logits[0], partition_fragment_C(mma, shape).layout());
    mma.accumulate_ = kOnto ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
    start(mma, a, b, c);
  }

  // A tile of rows as a left operand in registers: those of 16 columns are two of a row, two of the
  // row eight below, and the same eight columns on.
  __device__ static void load_rows(uint32_t (&rows)[kRowWords], Element *tile, int thread) {
    using namespace cute;
    auto elements = make_tensor(make_smem_ptr(tile), typename T::LayoutRows{});
    auto [row, column] = left_row(thread % 32);
    row += thread / 32 * 16;
    CUTE_UNROLL
    for (int i = 0; i < kRowWords; i += 4) {
      load_matrices(rows + i, raw_pointer_cast(&elements(row, column + 4 * i)));
    }
  }

  // logits = q k^T, with the rows of q in registers.
  __device__ static void start_qk(float (&logits)[kLogits], uint32_t (&q)[kRowWords],
                                  Element *k_tile) {
    using namespace cute;
    typename T::MmaQkFromRegisters mma;
    auto part = mma.get_slice(0);
    auto k = make_tensor(make_smem_ptr(k_tile), typename T::LayoutColumns{});
    auto q_shape = partition_shape_A(mma, Shape<typename T::Rows, typename T::Dim>{});
    auto a = make_tensor(reinterpret_cast<Element *>(&q[0]), q_shape);
    auto b = part.make_fragment_B(part.partition_B(k));
    auto shape = Shape<typename T::Rows, typename T::Columns>{};
    auto c = make_tensor(&logits[0], partition_fragment_C(mma, shape).layout());
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    start(mma, a, b, c);
  }

  // logits += q k^T of the 16 rows of a warp, which needs no other: by mma.sync, whose registers are those
  // of wgmma.
  __device__ static void add_qk_of_warp(float (&logits)[kLogits], Element *q_tile, Element *k_tile,
                                        int thread) {
    using namespace cute;
    using Mma = conditional_t<is_same_v<Element, cutlass::half_t>, SM80_16x8x16_F32F16F16F32_TN,
                              SM80_16x8x16_F32BF16BF16F32_TN>;
    auto queries = make_tensor(make_smem_ptr(q_tile), typename T::LayoutRows{});
    auto keys = make_tensor(make_smem_ptr(k_tile), typename T::LayoutColumns{});
    const MatrixRow left = left_row(thread % 32), right = right_row(thread % 32);
    CUTE_NO_UNROLL
    for (int k = 0; k < kDim; k += 16) {
      uint32_t a[4], b[4];
      load_matrices(a, raw_pointer_cast(&queries(thread / 32 * 16 + left.row, k + left.column)));
      CUTE_UNROLL
      for (int n = 0; n < kColumns; n += 16) {
        load_matrices(b, raw_pointer_cast(&keys(n + right.row, k + right.column)));
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float *c = &logits[n / 2 + 4 * half];
          Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1], c[0],
                   c[1], c[2], c[3]);
        }
      }
    }
  }

  // sums += p v; p may be overwritten, and the sums read, after a wait.
  __device__ static void start_pv(float (&sums)[kSums], uint32_t (&p)[kLogits / 2],
                                  Element *v_tile) {
    using namespace cute;
    typename T::MmaPv mma;
    auto part = mma.get_slice(0);
    auto v = make_tensor(make_smem_ptr(v_tile), typename T::LayoutTransposed{});
    auto p_shape = partition_shape_A(mma, Shape<typename T::Rows, typename T::Columns>{});
    auto a = make_tensor(reinterpret_cast<Element *>(&p[0]), p_shape);
    auto b = part.make_fragment_B(part.partition_B(v));
    auto shape = Shape<typename T::Rows, typename T::Dim>{};
    auto c = make_tensor(&sums[0], partition_fragment_C(mma, shape).layout());
    start(mma, a, b, c);
  }

  // Waits until at most `kPending` newer products are in flight; then `results` may be read.
  template <int kPending, int kCount>
  __device__ static void wait(float (&results)[kCount]) {
    cute::warpgroup_wait<kPending>();
    hold(results);
  }

 private:
  // c += a b, or = in the first step if `mma` says so.
  template <class Mma, class A, class B, class C>
  __device__ static void start(Mma &mma, const A &a, const B &b, C &c) {
    using namespace cute;
    CUTE_UNROLL
    for (int i = 0; i < size<2>(a); ++i) {
      gemm(mma, a(_, _, i), b(_, _, i), c);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  // Keeps the compiler from moving accesses to registers of a product past this point.
  template <class Register, int kCount>
  __device__ static void hold(Register (&registers)[kCount]) {
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(registers[i]);
  }
};

// dq of a step from ds, whose rows are keys, by one of two warpgroups: 64 queries, or where a step has no
// more of them, half of their columns. Both operands are in shared memory, the keys transposed; so is ds,
// unless it is the gradient of a bias too, which has queries as rows.
template <class Element, int kDim, bool kRowsOfQueries = false>
struct DqProduct {
  static constexpr int kColumns = kDim < 64 ? kDim : 64;
  static constexpr int kSums = kColumns / 2;
  static constexpr int kTile = 64 * 64;  // elements of ds, of 64 keys and queries
  using T = Tiles<Element, 64, 64>;
  using Keys = Tiles<Element, kColumns, 64>;
  using LayoutDs =  // [query, key]
      cute::conditional_t<kRowsOfQueries, typename T::LayoutRows, typename T::LayoutTransposed>;
  static constexpr auto kMajor = kRowsOfQueries ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<64>, cute::Int<kColumns>, cute::Int<64>>,
                                 kMajor, cute::GMMA::Major::MN>()));

  // Writes ds of 64 queries, packed as the left operand of ds q, to its tile.
  __device__ static void store_ds(Element *tile, uint32_t (&ds)[32 / 2], int thread) {
    using namespace cute;
    using Store = conditional_t<kRowsOfQueries, SM90_U16x8_STSM_T, SM90_U32x4_STSM_N>;
    auto elements = make_tensor(make_smem_ptr(tile), typename T::LayoutRows{});
    auto [row, column] = kRowsOfQueries ? right_row(thread % 32) : left_row(thread % 32);
    const int first_key = thread / 32 * 16;
    CUTE_UNROLL
    for (int i = 0; i < 16; i += 4) {
      auto *to = kRowsOfQueries ? raw_pointer_cast(&elements(row + 4 * i, first_key + column))
                                : raw_pointer_cast(&elements(first_key + row, column + 4 * i));
      Store::copy(ds[i], ds[i + 1], ds[i + 2], ds[i + 3], *reinterpret_cast<uint128_t *>(to));
    }
  }

  // dq = ds k over the keys of both warpgroups: tiles of 64, one after another.
  __device__ static void start(float (&dq)[kSums], Element *ds, Element *k, int k_stride) {
    using namespace cute;
    Mma mma;
    auto part = mma.get_slice(0);
    auto shape = Shape<Int<64>, Int<kColumns>>{};
    auto c = make_tensor(&dq[0], partition_fragment_C(mma, shape).layout());
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      auto left = make_tensor(make_smem_ptr(ds + half * kTile), LayoutDs{});
      auto right = make_tensor(make_smem_ptr(k + half * k_stride), typename Keys::LayoutTransposed{});
      auto a = part.make_fragment_A(part.partition_A(left));
      auto b = part.make_fragment_B(part.partition_B(right));
      CUTE_UNROLL
      for (int i = 0; i < size<2>(a); ++i) {
        gemm(mma, a(_, _, i), b(_, _, i), c);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
    }
    warpgroup_commit_batch();
  }
};

}  // namespace jsparse
