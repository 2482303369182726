// One compute warpgroup: 64 query rows of each item of its team, or their part that the team computes.
//
// Products and softmax overlap: while the softmax of step n runs, p v of step n - 1 and the products
// of other warpgroups are on the tensor core.
#pragma once

#include <cute/tensor.hpp>

#include "collective/bias.cuh"
#include "collective/element_mask.cuh"
#include "collective/epilogue.cuh"
#include "collective/products.cuh"
#include "collective/softmax.cuh"
#include "collective/tiles.cuh"
#include "kernel/params.h"

// With the code of a bias nvcc makes calls of the steps, and ptxas waits for products at calls. The files
// of those kernels define this as __forceinline__; elsewhere it would only change every schedule.
#ifndef JSPARSE_INLINE_STEPS
#define JSPARSE_INLINE_STEPS
#endif

namespace jsparse {

template <class Element, TileConfig kConfig>
struct Compute {
  using T = Tiles<Element, kConfig.head_dim, kConfig.tile_kv>;
  using Team = TeamStorage<Element, kConfig>;
  using Product = Products<Element, kConfig.head_dim, kConfig.tile_kv>;
  using Mask = ElementMask<kConfig.tile_kv>;
  static constexpr int kLogits = Product::kLogits, kSums = Product::kSums;

  static constexpr int kStride = kConfig.stride();

  const ForwardParams &params;
  SharedStorage<Element, kConfig> &shared;
  int team_index;
  int warpgroup;  // of the team
  int thread;     // of the warpgroup
  Team &team = shared.team[team_index];
  Position<kConfig.num_q_stages> at = {};  // the item
  Position<kConfig.num_stages> tile = {};  // the step
  uint32_t held_queries[Product::kRowWords] = {};

  __device__ JSPARSE_INLINE_STEPS void run(int worker) {
    if (kConfig.turns && warpgroup == 1) pass_turn();
    for (int count = params.args.schedule.item_count[worker]; count > 0; --count) {
      team.q_full[at.stage()].wait(at.parity());
      Item item{team.item[at.stage()]};
      float sums[kSums] = {};
      Softmax softmax;
      if (item.num_blocks() > 0) attend(item, sums, softmax);
      if constexpr (kConfig.share) join(sums, softmax);
      if (!kConfig.share || team_index == 0) {
        store<Element>(params.args, item, warpgroup, thread, sums, softmax);
      }
      // By each thread: where one lane arrived for a warp that read the item, racecheck saw races.
      team.q_free[at.stage()].arrive();
      at = at.plus(1);
    }
  }

 private:
  // ------------------------------------------------------------------------- one item

  // Partial blocks come first, then full ones.
  __device__ JSPARSE_INLINE_STEPS void attend(const Item &item, float (&sums)[kSums],
                                              Softmax &softmax) {
    const int per_block = steps_per_block();
    const int partial = item.num_partial() * per_block;
    const int total = item.num_blocks() * per_block;
    uint32_t p[kLogits / 2];
    if constexpr (kConfig.hold_queries()) Product::load_rows(held_queries, queries(), thread);
    int n = kConfig.first_step(team_index);
    if (kConfig.share && n >= total) return;

    team.full[tile.stage()].wait(tile.parity());
    if (n < partial) {
      step<true, true>(item, n, sums, p, softmax);
    } else {
      step<false, true>(item, n, sums, p, softmax);
    }
    n += kStride;
    for (; n < partial; n += kStride) step<true, false>(item, n, sums, p, softmax);
    for (; n < total; n += kStride) step<false, false>(item, n, sums, p, softmax);

    Product::begin(sums, p);
    Product::start_pv(sums, p, team.v[tile.stage()]);
    Product::template wait<0>(sums);
    release(team.free[tile.stage()]);
    tile = tile.plus(1);
  }

  // Probabilities of a step, beside p v of the step before, unless this is the first.
  template <bool kPartial, bool kFirst>
  __device__ JSPARSE_INLINE_STEPS void step(const Item &item, int n, float (&sums)[kSums],
                                            uint32_t (&p)[kLogits / 2], Softmax &softmax) {
    float logits[kLogits], alpha[2];
    const int now = tile.stage(), entry = team.entry[now];
    // Before the products: their logits would take the registers that the test needs.
    Mask mask;
    if constexpr (kPartial) mask = test_elements(item, n, entry);
    take_turn();
    if constexpr (kFirst) {
      Product::begin();
    } else {
      Product::begin(sums, p);
    }
    if constexpr (kConfig.hold_queries()) {
      Product::start_qk(logits, held_queries, team.k[now]);
    } else {
      Product::start_qk(logits, queries(), team.k[now]);
    }
    if constexpr (!kFirst) Product::start_pv(sums, p, team.v[now]);
    pass_turn();
    auto bias = bias_of(now);
    bias.read_ahead();
    Product::template wait<!kFirst>(logits);
    // Asked here, where the answer need not be waited for.
    const auto next = tile.plus(1);
    const bool loaded = team.full[next.stage()].passed(next.parity());
    bool raised = true;
    bias.add_to(logits, params.inverse_scale);
    if constexpr (kPartial || kFirst || !kConfig.guess) {
      if constexpr (kPartial) apply(mask, item, n, entry, logits);
      probabilities(logits, softmax, alpha);
    } else {
      raised = guess(logits, softmax, alpha);
    }
    // This branch also keeps ptxas from moving the wait for p v up into the softmax.
    if (!loaded) team.full[next.stage()].wait(next.parity());
    if constexpr (kPartial) clean_values(item, n, entry, next.stage());
    if constexpr (!kFirst) {
      Product::template wait<0>(sums);
      if (raised) rescale(sums, alpha);
    }
    release(team.free[now]);
    pack_all(p, logits);
    tile = next;
  }

  // Probabilities relative to the maximum of the steps before. A warp that finds one of its maxima too
  // low computes its logits once more, by itself, and raises them.
  __device__ bool guess(float (&logits)[kLogits], Softmax &softmax, float (&alpha)[2]) {
    float total[2];
    bool good = softmax.template guess<kConfig.lazy, kConfig.polynomial_every>(
        logits, params.scale_log2, total);
    bool raise = __any_sync(0xffffffff, !good);
    if (raise) {
      CUTE_UNROLL
      for (int i = 0; i < kLogits; ++i) logits[i] = 0.0f;
      Product::add_qk_of_warp(logits, queries(), team.k[tile.stage()], thread);
      auto bias = bias_of(tile.stage());
      bias.read_ahead();
      bias.add_to(logits, params.inverse_scale);
      probabilities(logits, softmax, alpha);
    } else {
      softmax.sum[0] += total[0];
      softmax.sum[1] += total[1];
    }
    return raise;
  }

  __device__ void probabilities(float (&logits)[kLogits], Softmax &softmax,
                                float (&alpha)[2]) const {
    softmax.template step<kConfig.lazy, kConfig.polynomial_every>(logits, params.scale_log2, alpha);
  }

  // Adds the results of the other teams to those of the first one, in their order.
  __device__ void join(float (&sums)[kSums], Softmax &softmax) {
    constexpr int kBarrier = 1 + kConfig.teams, kThreads = 128 * kConfig.teams;
    if (team_index > 0) {
      auto &mine = shared.found[team_index - 1];
      CUTE_UNROLL
      for (int i = 0; i < kSums; ++i) mine[i][thread] = sums[i];
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        mine[kSums + half][thread] = softmax.max[half];
        mine[kSums + 2 + half][thread] = softmax.sum[half];
      }
    }
    sync_named(kBarrier, kThreads);
    for (int other = 1; team_index == 0 && other < kConfig.teams; ++other) {
      auto &theirs = shared.found[other - 1];
      float alpha[2], beta[2];
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        softmax.add(half, theirs[kSums + half][thread], theirs[kSums + 2 + half][thread],
                    alpha[half], beta[half]);
      }
      CUTE_UNROLL
      for (int i = 0; i < kSums; ++i) {
        sums[i] = fmaf(theirs[i][thread], beta[i >> 1 & 1], sums[i] * alpha[i >> 1 & 1]);
      }
    }
    sync_named(kBarrier, kThreads);  // then they may be written again
  }

  __device__ Element *queries() const { return team.q[at.stage()][warpgroup]; }

  __device__ int steps_per_block() const { return params.args.block_kv / kConfig.tile_kv; }

  // ---------------------------------------------------------------------- arithmetic

  // The registers of the accumulator, pair by pair, are those of the operand.
  __device__ static void pack_all(uint32_t (&p)[kLogits / 2], const float (&s)[kLogits]) {
    CUTE_UNROLL
    for (int i = 0; i < kLogits / 2; ++i) p[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
  }

  // Unless alpha is 1 in the whole warp, as it mostly is where the maximum is lazy.
  __device__ static void rescale(float (&sums)[kSums], const float (&alpha)[2]) {
    if (kConfig.lazy > 0 && !__any_sync(0xffffffff, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
    CUTE_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] *= alpha[i >> 1 & 1];
  }

  // What a step adds to its logits.
  __device__ auto bias_of(int stage) const {
    if constexpr (kConfig.bias_size == 0) {
      return NoBias{};
    } else {
      using Value = cute::conditional_t<kConfig.bias_size == 2, Element, float>;
      const int row = warpgroup * 64 + thread / 32 * 16;
      return SharedBias<Value, kConfig.tile_q, kConfig.tile_kv, kConfig.bias_ahead()>{
          team.bias.tile[stage], row, thread % 32, params.args.bias.rows == 1};
    }
  }

  // ------------------------------------------------------------------- partial blocks

  // First key of step n, of the block of a list entry.
  __device__ int first_key(int n, int entry) const {
    int block = block_of(entry);
    return block * params.args.block_kv + n % steps_per_block() * kConfig.tile_kv;
  }

  // The first row and column that the thread holds of a step.
  __device__ Place place_of(const Item &item, int n, int entry) const {
    int row = item.row() * kConfig.tile_q + warpgroup * 64 + first_row(thread);
    return {item.batch(), row, first_key(n, entry) + first_column(thread)};
  }

  __device__ Mask test_elements(const Item &item, int n, int entry) const {
    Place place = place_of(item, n, entry);
    return ElementTest<kConfig.tile_kv>::at(params.args.elements, params.sizes, place,
                                            item.first_bits() + n / steps_per_block());
  }

  // -inf for elements that do not count, and, for keys whose values are not finite, NaN before.
  __device__ void apply(const Mask &mask, const Item &item, int n, int entry,
                        float (&logits)[kLogits]) const {
    if (entry >= JSPARSE_FLAGGED) {
      const int32_t *bad = bad_keys(item) + first_key(n, entry) + first_column(thread);
      CUTE_UNROLL
      for (int i = 0; i < kLogits; ++i) {
        if (bad[i / 4 * 8 + i % 2] != 0) logits[i] = __builtin_nanf("");
      }
    }
    mask.apply(logits, -kInfinity);
  }

  // Sets values that are not finite to zero: a NaN times p = 0 would reach rows that do not see it.
  __device__ void clean_values(const Item &item, int n, int entry, int stage) {
    if (entry < JSPARSE_FLAGGED) return;
    int key = warpgroup * 128 + thread;  // each thread of the team has one
    if (key < kConfig.tile_kv && bad_keys(item)[first_key(n, entry) + key] != 0) {
      clear_token<T>(team.v[stage], kConfig.tile_kv, key);
    }
    fence_async_shared();
    sync_named(1 + team_index, kConfig.warpgroups() * 128);
  }

  __device__ const int32_t *bad_keys(const Item &item) const {
    const jsparse_forward_args &args = params.args;
    int kv_head = item.head() / (args.num_heads / args.num_kv_heads);
    int64_t row = int64_t(item.batch()) * args.num_kv_heads + kv_head;
    return args.elements.bad + row * params.sizes.columns;
  }

  // ------------------------------------------------------------------- synchronisation

  // Every warp tells of its own reads.
  __device__ void release(Barrier &barrier) const {
    __syncwarp();
    if (thread % 32 == 0) barrier.arrive();
  }

  // Waits until the other warpgroup has issued its products.
  __device__ void take_turn() const {
    if constexpr (kConfig.turns) sync_named(turn_barrier(warpgroup), 256);
  }

  __device__ void pass_turn() const {
    if constexpr (kConfig.turns) arrive_named(turn_barrier(1 - warpgroup), 256);
  }

  __device__ int turn_barrier(int of_warpgroup) const {
    return 1 + kConfig.teams + 2 * team_index + of_warpgroup;
  }
};

}  // namespace jsparse
