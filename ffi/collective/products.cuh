// The products of one warpgroup on the tensor core (wgmma), by CuTe: started in order, each a group
// of its own, and waited for one by one.
#pragma once

#include <cute/tensor.hpp>

#include "collective/tiles.cuh"

namespace jsparse {

template <class Element, int kDim, int kColumns>
struct Products {
  using T = Tiles<Element, kDim, kColumns>;
  static constexpr int kLogits = kColumns / 2;  // registers of a tile of logits
  static constexpr int kSums = kDim / 2;        // registers of the sums

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
    CUTE_UNROLL
    for (int i = 0; i < size<2>(a); ++i) {
      gemm(mma, a(_, _, i), b(_, _, i), c);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
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
    CUTE_UNROLL
    for (int i = 0; i < size<2>(a); ++i) gemm(mma, a(_, _, i), b(_, _, i), c);
    warpgroup_commit_batch();
  }

  // Waits until at most `kPending` newer products are in flight; then `results` may be read.
  template <int kPending, int kCount>
  __device__ static void wait(float (&results)[kCount]) {
    cute::warpgroup_wait<kPending>();
    hold(results);
  }

 private:
  // Keeps the compiler from moving accesses to registers of a product past this point.
  template <class Register, int kCount>
  __device__ static void hold(Register (&registers)[kCount]) {
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(registers[i]);
  }
};

}  // namespace jsparse
