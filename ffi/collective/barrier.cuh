// Barriers in shared memory, and fences. Unlike CUTLASS's, the compiler moves no access to memory
// across them: items, list entries and zeroed values travel beside the tiles, by ordinary accesses.
#pragma once

#include <cute/arch/util.hpp>
#include <cutlass/detail/helper_macros.hpp>

namespace jsparse {

// An mbarrier. Its phases complete one after another; waiting for one names its parity.
class Barrier {
 public:
  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals)
                 : "memory");
  }

  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }

  // The phase then also waits for `bytes` of copies.
  __device__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }

  __device__ void wait(uint32_t parity) {
    asm volatile(
        "{ .reg .pred done; \n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; \n"
        "@!done bra WAIT; }" ::"r"(address()),
        "r"(parity)
        : "memory");
  }

  // Whether a wait would be over.
  __device__ bool passed(uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred done; \n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; \n"
        "selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
    return done;
  }

  __device__ uint64_t *pointer() { return &state_; }

 private:
  __device__ uint32_t address() { return cute::cast_smem_ptr_to_uint(&state_); }

  uint64_t state_;
};

// After barriers were initialised, before copies use them.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// After ordinary stores to shared memory, before products read them.
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers of `threads` threads; number 0 is __syncthreads.
__device__ inline void sync_named(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void arrive_named(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace jsparse
