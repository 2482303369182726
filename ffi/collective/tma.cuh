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

}  // namespace jsparse
