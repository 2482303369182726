// As ffi/collective/barrier.cuh, for `simulated::Cta`.
#pragma once

#include "simulated/cta.h"

namespace jsparse {

class Barrier {
 public:
  void init(int arrivals) { *this = {arrivals, arrivals}; }

  void arrive() {
    if (--pending_ < 0) simulated::cta->trouble = "more arrivals at a barrier than it expects";
    complete();
  }

  void arrive_and_expect(uint32_t bytes) {
    bytes_ += bytes;
    arrive();
  }

  void arrive_bytes(uint32_t bytes) {
    bytes_ -= bytes;
    complete();
  }

  void wait(uint32_t parity) {
    simulated::cta->wait_until([this, parity] { return passed(parity); });
  }

  bool passed(uint32_t parity) const { return phase_ % 2 != parity; }

  Barrier() = default;

 private:
  Barrier(int arrivals, int pending) : arrivals_(arrivals), pending_(pending) {}

  void complete() {
    if (pending_ != 0 || bytes_ != 0) return;
    ++phase_;
    pending_ = arrivals_;
  }

  int arrivals_ = 0, pending_ = 0;
  int64_t bytes_ = 0;
  uint32_t phase_ = 0;
};

inline void fence_async_shared() {}

inline void sync_named(int number, int threads) {
  simulated::cta->meet(simulated::cta->named(number, threads));
}

inline void arrive_named(int number, int threads) {
  simulated::cta->named(number, threads).arrive();
}

}  // namespace jsparse
