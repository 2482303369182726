// Copies from global to shared memory by TMA.
#pragma once

#include <cuda.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "collective/barrier.cuh"

namespace jsparse {

__device__ inline void prefetch_map(const CUtensorMap &map) {
  cute::prefetch_tma_descriptor(&map);
}

// `bytes` at multiples of 16 bytes, which `full` is told of when they are there.
__device__ inline void copy_words(Barrier &full, void *to, const void *from, uint32_t bytes) {
  cute::SM90_BULK_COPY_G2S::copy(from, full.pointer(), to, int32_t(bytes));
}

// One box of an array [B, tokens, heads, dim]; tokens beyond it arrive as zeros. `full` is told of
// the bytes when they are there.
__device__ inline void copy_box(const CUtensorMap &map, Barrier &full, void *to, int column,
                                int head, int token, int batch) {
  cute::SM90_TMA_LOAD_4D::copy(&map, full.pointer(),
                               uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, column, head,
                               token, batch);
}

// Whether the L2 cache keeps what others read too, or gives it up first.
constexpr uint64_t kKeep = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint64_t kStream = uint64_t(cute::TMA::CacheHintSm90::EVICT_FIRST);

// One box of an array [arrays, rows, columns].
__device__ inline void copy_box(const CUtensorMap &map, Barrier &full, void *to, int column, int row,
                                int array, uint64_t hint = kKeep) {
  cute::SM90_TMA_LOAD_3D::copy(&map, full.pointer(), hint, to, column, row, array);
}

// A box back to such an array, of the thread that waits for it below.
__device__ inline void copy_box_back(const CUtensorMap &map, const void *from, int column, int row,
                                     int array) {
  uint32_t shared = cute::cast_smem_ptr_to_uint(from);
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint "
      "[%0, {%1, %2, %3}], [%4], %5;" ::"l"(&map),
      "r"(column), "r"(row), "r"(array), "r"(shared), "l"(kStream)
      : "memory");
}

// `bytes` back to global memory, or added there to float32; of the thread that waits for them below.
__device__ inline void copy_back(float *to, const float *from, uint32_t bytes) {
  cute::SM90_BULK_COPY_S2G::copy(from, to, int32_t(bytes));
}
__device__ inline void add_back(float *to, const float *from, uint32_t bytes) {
  uint32_t shared = cute::cast_smem_ptr_to_uint(from);
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared), "r"(bytes)
               : "memory");
}

// Until what the thread sent back is read, so that its place is free; and until it is there.
__device__ inline void await_read() {
  asm volatile(
      "cp.async.bulk.commit_group;\n"
      "cp.async.bulk.wait_group.read 0;" ::
          : "memory");
}
__device__ inline void await_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Turns of threads of all CTAs: the n-th waits until `taken` is n, and what those before it sent back is
// there; in the end it passes the turn.
__device__ inline void await_turn(const int32_t *taken, int turn) {
  int32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(taken) : "memory");
  } while (now != turn);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ inline void pass_turn(int32_t *taken, int turn) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(taken), "r"(turn + 1) : "memory");
}

}  // namespace jsparse
