// A CTA on a CPU, or several that run at a time: its threads are fibers, of which one runs at a time,
// until it waits. They come in random order, and now and then a warp is held up for long, so that what
// others may do meanwhile is done. The same seed gives the same order. If all threads wait, the CTA
// hangs.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace simulated {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where `size` threads meet, again and again.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned generation = 0;

  void arrive() {
    if (++arrived < size) return;
    arrived = 0;
    ++generation;
  }
};

class Cta;
inline Cta *cta;

class Cta {
 public:
  // Several have `threads` each.
  explicit Cta(unsigned seed, int threads = 1024) : random_(seed), threads_of_cta_(threads) { cta = this; }

  // `index` is threadIdx.x, counted over the CTAs: warps and quads meet by it.
  void add(int index, std::function<void()> body) {
    threads_.push_back(std::make_unique<Thread>());
    Thread &thread = *threads_.back();
    thread.index = index;
    thread.body = std::move(body);
    thread.stack.resize(1 << 17);
    getcontext(&thread.start);
    thread.start.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
    makecontext(&thread.start, &Cta::enter, 0);
    ++quads_[index / 4].size;
    ++warps_[index / 32].size;
  }

  void run() {
    size_t left = threads_.size();
    for (unsigned round = 0; left > 0; ++round) {
      std::shuffle(threads_.begin(), threads_.end(), random_);
      if (random_() % 4 == 0) held_until_[threads_[0]->index / 32] = round + 50;
      bool any = false;
      for (auto &thread : threads_) {
        if (thread->done || (thread->ready && !thread->ready())) continue;
        any = true;
        if (round < held_until_[thread->index / 32]) continue;
        thread->ready = nullptr;
        resume(*thread);
        if (!trouble.empty()) throw Failure(trouble);
        left -= thread->done;
      }
      any |= copy_one(copies_);
      if (!stores_.empty() && random_() % 256 == 0) stores_held_until_ = round + 200;
      any |= round < stores_held_until_ ? !stores_.empty() : copy_one(stores_);
      if (!any) throw Failure("all threads wait");
    }
    if (!copies_.empty() || !stores_.empty()) throw Failure("a copy was not waited for");
  }

  void wait_until(std::function<bool()> ready) {
    running_->ready = std::move(ready);
    if (_setjmp(running_->paused) == 0) _longjmp(scheduler_, 1);
  }

  void meet(Meeting &meeting) {
    unsigned generation = meeting.generation;
    meeting.arrive();
    wait_until([&meeting, generation] { return meeting.generation != generation; });
  }
  void meet_quad() { meet(quads_[running_->index / 4]); }
  void meet_warp() { meet(warps_[running_->index / 32]); }

  Meeting &named(int number, int threads) {
    Meeting &meeting = named_[{index() / threads_of_cta_, number}];
    meeting.size = threads;
    return meeting;
  }

  // Copies to shared memory happen in their order, but late.
  void copy_later(std::function<void()> copy) { copies_.push_back(std::move(copy)); }
  // So do copies from there, some of them much later.
  void store_later(std::function<void()> copy) {
    int by = index();
    ++stores_of_[by];
    stores_.push_back([this, by, copy = std::move(copy)] {
      copy();
      --stores_of_[by];
    });
  }
  // Until the thread's are done.
  void await_stores() {
    wait_until([this, by = index()] { return stores_of_[by] == 0; });
  }

  int index() const { return running_->index; }

  // What the threads of a quad or warp show one another.
  uint32_t words[1 << 14];
  const void *shown[1 << 14];
  std::string trouble;

 private:
  struct Thread {
    int index;
    bool started = false, done = false;
    std::function<void()> body;
    std::function<bool()> ready;
    std::vector<char> stack;
    ucontext_t start;
    jmp_buf paused;
  };

  static void enter() {
    cta->running_->body();
    cta->running_->done = true;
    _longjmp(cta->scheduler_, 1);
  }

  // Until it waits, or is done. A thread is entered once by its context; from then on jumps, which unlike
  // swapcontext ask nothing of the kernel.
  void resume(Thread &thread) {
    running_ = &thread;
    if (_setjmp(scheduler_) != 0) return;
    if (thread.started) _longjmp(thread.paused, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  bool copy_one(std::deque<std::function<void()>> &copies) {
    if (copies.empty()) return false;
    if (random_() % 4 != 0) return true;
    copies.front()();
    copies.pop_front();
    return true;
  }

  std::mt19937 random_;
  std::map<int, unsigned> held_until_;  // round, by warp
  std::vector<std::unique_ptr<Thread>> threads_;
  std::map<int, Meeting> quads_, warps_;
  std::map<std::pair<int, int>, Meeting> named_;  // by CTA and number
  std::map<int, int> stores_of_;                  // by thread
  int threads_of_cta_;
  std::deque<std::function<void()>> copies_, stores_;
  unsigned stores_held_until_ = 0;  // round
  Thread *running_ = nullptr;
  jmp_buf scheduler_;
};

}  // namespace simulated

template <class Value>
Value __shfl_xor_sync(unsigned, Value x, int distance) {
  static_assert(sizeof x == 4);
  auto *cta = simulated::cta;
  std::memcpy(&cta->words[cta->index()], &x, 4);
  cta->meet_quad();
  std::memcpy(&x, &cta->words[cta->index() ^ distance], 4);
  cta->meet_quad();
  return x;
}

inline bool __any_sync(unsigned, bool x) {
  auto *cta = simulated::cta;
  cta->words[cta->index()] = x;
  cta->meet_warp();
  int first = cta->index() / 32 * 32;
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= cta->words[first + i] != 0;
  cta->meet_warp();
  return any;
}

inline void __syncwarp() { simulated::cta->meet_warp(); }
