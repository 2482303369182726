// One compute warpgroup of the dq kernel: 64 query rows of each item of its team.
//
// s = q k^T, dp = dout v^T, p = 2^(s - lse2), ds = p (dp - delta), dq += ds k: three products a step.
// ds k of a step runs beside the logits of the next.
#pragma once

#include "collective/backward.cuh"

namespace jsparse {

template <class Element, BackwardConfig kConfig>
struct ComputeDq {
  using Thread = BackwardThread<Element, kConfig>;
  using Product = Products<Element, kConfig.head_dim, kConfig.tile>;
  static constexpr int kLogits = Product::kLogits, kSums = Product::kSums;

  // lse2 and delta of the thread's two rows.
  struct Statistics {
    float lse2[2], delta[2];
  };

  // The queries of an item are read from shared memory once, not at each step; a bias takes their
  // registers.
  static constexpr bool kHoldQueries = !kConfig.bias;

  Thread me;
  Position<kConfig.num_row_stages> at = {};  // the item
  Position<kConfig.num_stages> tile = {};    // the step
  uint32_t queries[Product::kRowWords] = {};

  __device__ void run(int worker) {
    auto &team = me.team;
    me.give_first_turn();
    for (int count = me.params.args.schedule.item_count[worker]; count > 0; --count) {
      team.rows_full[at.stage()].wait(at.parity());
      Item item{team.item[at.stage()]};
      float sums[kSums] = {};
      if (item.num_blocks() > 0) attend(item, sums);
      me.store(item, me.params.first, sums);
      me.release(team.rows_free[at.stage()]);
      at = at.plus(1);
    }
  }

 private:
  // Partial blocks come first, then full ones.
  __device__ void attend(const Item &item, float (&sums)[kSums]) {
    const int per_block = me.steps_per_block();
    const int partial = item.num_partial() * per_block;
    const int total = item.num_blocks() * per_block;
    const Statistics rows = statistics(item);
    uint32_t ds[kLogits / 2];
    if constexpr (kHoldQueries) {
      Product::load_rows(queries, me.team.rows[0][at.stage()][me.warpgroup], me.thread);
    }
    me.await_tile(0, true, tile);
    me.await_tile(1, true, tile);
    if (partial > 0) {
      step<true, true>(item, 0, total, rows, sums, ds);
    } else {
      step<false, true>(item, 0, total, rows, sums, ds);
    }
    int n = 1;
    for (; n < partial; ++n) step<true, false>(item, n, total, rows, sums, ds);
    for (; n < total; ++n) step<false, false>(item, n, total, rows, sums, ds);

    int last = tile.plus(-1).stage();
    Product::begin(sums, ds);
    Product::start_pv(sums, ds, me.team.columns[0][last]);
    Product::template wait<0>(sums);
    me.release(me.team.free[0][last]);
  }

  // ds of a step, beside ds k of the step before, unless this is the first.
  template <bool kPartial, bool kFirst>
  __device__ void step(const Item &item, int n, int total, const Statistics &rows,
                       float (&sums)[kSums], uint32_t (&ds)[kLogits / 2]) {
    constexpr int kBeside = !kFirst;
    auto &team = me.team;
    const int now = tile.stage(), before = tile.plus(-1).stage(), entry = team.entry[now];
    float p[kLogits], dp[kLogits];
    // Before the products, whose results would take the registers that the test needs.
    typename Thread::Mask mask;
    if constexpr (kPartial) mask = me.test_elements(item, n, entry);
    if constexpr (kConfig.bias) {
      me.bias_of(item, n, entry, now).template load<kPartial>(p, me.params.inverse_scale);
      Product::begin_onto(p);
    }
    me.take_turn();
    if constexpr (kFirst) {
      Product::begin();
    } else {
      Product::begin(sums, ds);
    }
    if constexpr (kHoldQueries) {
      Product::start_qk(p, queries, team.columns[0][now]);
    } else {
      Product::template start_qk<true>(p, team.rows[0][at.stage()][me.warpgroup],
                                       team.columns[0][now]);
    }
    Product::start_qk(dp, team.rows[1][at.stage()][me.warpgroup], team.columns[1][now]);
    if constexpr (!kFirst) Product::start_pv(sums, ds, team.columns[0][before]);
    me.pass_turn();

    Product::template wait<1 + kBeside>(p);
    if constexpr (kPartial) me.clean(item, n, entry, team.columns[0][now]);
    CUTE_UNROLL
    for (int i = 0; i < kLogits; ++i) {
      p[i] = exp2_mufu(fmaf(p[i], me.params.scale_log2, -rows.lse2[i >> 1 & 1]));
    }
    if constexpr (kPartial) mask.apply(p, 0.0f);  // lse2 may be NaN
    me.await_tile(0, n + 1 < total, tile.plus(1));
    Product::template wait<kBeside>(dp);
    me.release(team.free[1][now]);
    CUTE_UNROLL
    for (int i = 0; i < kLogits; ++i) {
      p[i] = logits_gradient<kPartial>(p[i], dp[i], rows.delta[i >> 1 & 1]);
    }
    if constexpr (kConfig.bias) {
      void *to = me.params.bias_gradient;
      if (to != nullptr) me.bias_of(item, n, entry, now).template store<kPartial>(p, to);
    }
    me.await_tile(1, n + 1 < total, tile.plus(1));
    if constexpr (!kFirst) {
      Product::template wait<0>(sums);
      me.release(team.free[0][before]);
    }
    pack_operand<Element>(ds, p);
    tile = tile.plus(1);
  }

  __device__ Statistics statistics(const Item &item) const {
    const jsparse_backward_args &args = me.params.args;
    int64_t head = int64_t(item.batch()) * args.num_heads + item.head();
    int64_t row = head * me.params.sizes.rows + item.row() * kConfig.block_rows + me.row_in_block();
    return {{args.lse2[row], args.lse2[row + 8]}, {args.delta[row], args.delta[row + 8]}};
  }
};

}  // namespace jsparse
