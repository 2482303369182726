// The online softmax of one warpgroup, in base 2, on the registers of a thread.
//
// A thread holds two rows of a 64-row accumulator, r and r + 8: register i belongs to the second if
// i & 2. A row is spread over the four lanes of a quad.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstring>
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

namespace jsparse {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float exp2_mufu(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);  // the tests run this file on a CPU
#endif
}

// 2^x for x <= 127 without the MUFU: a polynomial in the rest in [-0.5, 0.5] times 2^round(x). Less
// exact than the 16 bits that p is rounded to would show; 2^-inf is exactly 0.
__host__ __device__ inline float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it has the integer in its low bits
  x = x < -127.0f ? -127.0f : x;         // and a NaN stays one
  float shifted = x + kRound;
  float rest = x - (shifted - kRound);
  float y = 0.05517167f;  // the best cubic; its relative error is at most 7.5e-5
  y = y * rest + 0.24261114f;
  y = y * rest + 0.69326099f;
  y = y * rest + 0.99992807f;
  return y * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
}

template <class Op>
__device__ float across_quad(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffff, x, 1));
  return op(x, __shfl_xor_sync(0xffffffff, x, 2));
}

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Add {
  __device__ float operator()(float x, float y) const { return x + y; }
};

// Two 16-bit values, rounded to nearest; x in the lower half.
template <class Element>
__device__ uint32_t pack(float x, float y) {
  uint32_t word;
  if constexpr (cute::is_same_v<Element, cutlass::half_t>) {
    __half2 both = __floats2half2_rn(x, y);
    memcpy(&word, &both, sizeof word);
  } else {
    __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    memcpy(&word, &both, sizeof word);
  }
  return word;
}

// Running maximum and sum of the thread's two rows. The sum is this lane's part of it.
struct Softmax {
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};

  // Turns a tile of logits into probabilities relative to the running maximum; `alpha` is what
  // earlier sums must be multiplied by.
  //
  // The maximum is raised only when it has grown by more than kLazy powers of two, so that p is at
  // most 2^kLazy and most steps rescale nothing (an idea of FlashAttention-4). While nothing is
  // allowed the maximum is -inf, and p and alpha are 0. A NaN leaves the maximum and makes the sum
  // NaN.
  template <float kLazy, int kPolynomialEvery, int kCount>
  __device__ void step(float (&s)[kCount], float scale_log2, float (&alpha)[2]) {
    float minus_max[2];
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float top[2] = {s[2 * half], s[2 * half + 1]};
      CUTE_UNROLL
      for (int i = 4; i < kCount; ++i) {
        if ((i >> 1 & 1) == half) top[i & 1] = fmaxf(top[i & 1], s[i]);
      }
      float scaled = across_quad(fmaxf(top[0], top[1]), Max{}) * scale_log2;
      float before = max[half];
      if constexpr (kLazy > 0) {
        max[half] = scaled - before > kLazy ? scaled : before;
      } else {
        max[half] = fmaxf(before, scaled);
      }
      minus_max[half] = max[half] == -kInfinity ? 0.0f : -max[half];
      alpha[half] = exp2_mufu(before + minus_max[half]);
    }
    float total[2];
    exponentials<kPolynomialEvery>(s, scale_log2, minus_max, total);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) sum[half] = fmaf(sum[half], alpha[half], total[half]);
  }

  // The same relative to the maximum as it is, which saves finding a tile's own. False, and nothing
  // summed, if it was too low: a probability may be above 2^kLazy, or is NaN, or the row has seen
  // nothing before, so that its maximum of -inf makes every probability infinite.
  template <float kLazy, int kPolynomialEvery, int kCount>
  __device__ bool guess(float (&s)[kCount], float scale_log2, float (&total)[2]) const {
    const float minus_max[2] = {-max[0], -max[1]};
    exponentials<kPolynomialEvery>(s, scale_log2, minus_max, total);
    constexpr float kLimit = 1 << int(kLazy);
    return total[0] <= kLimit && total[1] <= kLimit;
  }

  // Adds other elements of the rows; what was summed before is to be multiplied by `alpha`, what
  // belongs to the others by `beta`.
  __device__ void add(int half, float their_max, float their_sum, float &alpha, float &beta) {
    float top = fmaxf(max[half], their_max), minus = top == -kInfinity ? 0.0f : -top;
    alpha = exp2_mufu(max[half] + minus);
    beta = exp2_mufu(their_max + minus);
    max[half] = top;
    sum[half] = fmaf(their_sum, beta, sum[half] * alpha);
  }

  // What the accumulator of a row is divided by, and its lse. A row that saw nothing gives 0, -inf.
  __device__ void finish(float (&inverse)[2], float (&lse)[2]) const {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = across_quad(sum[half], Add{});
      inverse[half] = total == 0 ? 0.0f : 1.0f / total;
      lse[half] = kLn2 * (max[half] + log2f(total));
    }
  }

 private:
  // exp2(s * scale_log2 + minus_max), and their sums.
  template <int kPolynomialEvery, int kCount>
  __device__ static void exponentials(float (&s)[kCount], float scale_log2,
                                      const float (&minus_max)[2], float (&total)[2]) {
    float parts[4];
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      float x = fmaf(s[i], scale_log2, minus_max[i >> 1 & 1]);
      bool polynomial = kPolynomialEvery > 0 && (i >> 2) % max_of(kPolynomialEvery, 1) == 0;
      s[i] = polynomial ? exp2_polynomial(x) : exp2_mufu(x);
      parts[i & 3] = i < 4 ? s[i] : parts[i & 3] + s[i];
    }
    total[0] = parts[0] + parts[1];
    total[1] = parts[2] + parts[3];
  }

  __host__ __device__ static constexpr int max_of(int x, int y) { return x > y ? x : y; }
};

}  // namespace jsparse
