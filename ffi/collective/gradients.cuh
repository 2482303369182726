// One compute warpgroup of the kernel of all gradients: 64 key rows of each item.
//
// As ComputeDkv, and dq += ds^T k: five products a step. dq of a step is computed beside the arithmetic of
// the next.
#pragma once

#include "collective/dkv.cuh"
#include "collective/dq_by_key.cuh"

namespace jsparse {

template <class Element, BackwardConfig kConfig>
struct ComputeGradients : ComputeDkv<Element, kConfig> {
  using Base = ComputeDkv<Element, kConfig>;
  using Dq = DqByKey<Element, kConfig>;
  using typename Base::Mask, typename Base::Part, typename Base::Product, typename Base::Statistics;
  using Base::at, Base::kLogits, Base::kParts, Base::kPartLogits, Base::kPartSize, Base::kReadAhead,
      Base::kSums, Base::me, Base::tile;

  // Whether the next step's tiles are asked for before the arithmetic, so that the answer need not be
  // waited for; at D 32 it is slower.
  static constexpr bool kAskEarly = kConfig.head_dim > 32;

  Dq dq_by_key = {};

  // No calls, here and below: at them ptxas would wait for products.
  __device__ __forceinline__ void run(int worker) {
    auto &team = me.team;
    const int group = me.params.args.num_heads / me.params.args.num_kv_heads;
    float dk[kSums] = {}, dv[kSums] = {};
    for (int count = me.params.args.schedule.item_count[worker]; count > 0; --count) {
      team.rows_full[at.stage()].wait(at.parity());
      Item item{team.item[at.stage()]};
      const int in_group = item.head() % group;
      CUTE_UNROLL
      for (int i = 0; i < kSums; ++i) {
        dk[i] = in_group == 0 ? 0.0f : dk[i];
        dv[i] = in_group == 0 ? 0.0f : dv[i];
      }
      if (item.num_blocks() > 0) attend(item, dk, dv);
      if (in_group == group - 1) {
        me.store(item, me.params.first, dk);
        me.store(item, me.params.second, dv);
      }
      me.release(team.rows_free[at.stage()]);
      at = at.plus(1);
    }
  }

 private:
  // Partial blocks come first, then full ones.
  __device__ __forceinline__ void attend(const Item &item, float (&dk)[kSums], float (&dv)[kSums]) {
    const int per_block = me.steps_per_block();
    const int partial = item.num_partial() * per_block;
    const int total = item.num_blocks() * per_block;
    me.await_tile(0, true, tile);
    me.await_tile(1, true, tile);
    if (partial > 0) {
      step<true, true>(item, 0, total, dk, dv);
    } else {
      step<false, true>(item, 0, total, dk, dv);
    }
    int n = 1;
    for (; n < partial; ++n) step<true, false>(item, n, total, dk, dv);
    for (; n < total; ++n) step<false, false>(item, n, total, dk, dv);

    typename Dq::Sums dq;
    dq_by_key.publish(me);
    dq_by_key.await_before(me);
    dq_by_key.start(me, item, at.stage(), dq);
    Product::template wait<0>(dq);
    dq_by_key.finish(me, item, at.stage(), dq);
    dq_by_key.publish_last(me);
  }

  // With dq of the step before, unless this is the first.
  template <bool kPartial, bool kFirst>
  __device__ __forceinline__ void step(const Item &item, int n, int total, float (&dk)[kSums],
                                       float (&dv)[kSums]) {
    constexpr bool kDq = !kFirst;
    auto &team = me.team;
    const int now = tile.stage(), entry = team.entry[now];
    Element *q = team.columns[0][now], *dout = team.columns[1][now];
    float p[kLogits], dp[kLogits];
    typename Dq::Sums dq;
    uint32_t p_operand[kParts][kPartLogits / 2], ds_operand[kParts][kPartLogits / 2];
    // Before the products, whose results would take the registers that the test needs.
    Mask mask;
    if constexpr (kPartial) {
      me.clean(item, n, entry, q, dout);
      mask = me.test_elements(item, n, entry);
    }
    Product::begin();
    Product::start_qk(p, team.rows[0][at.stage()][me.warpgroup], q);
    Product::start_qk(dp, team.rows[1][at.stage()][me.warpgroup], dout);
    if constexpr (kDq) dq_by_key.publish(me);

    Statistics lse2[kParts], delta[kParts];
    if constexpr (kReadAhead) this->read_statistics(lse2[0], 0, 0, now);
    Product::template wait<1>(p);
    if constexpr (kConfig.bias) add_bias(p);
    const bool loaded = kAskEarly && me.loaded(n + 1 < total, tile.plus(1));
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if constexpr (!kReadAhead) this->read_statistics(lse2[part], 0, part, now);
      this->template probabilities<kPartial>(p, part, mask, lse2[part]);
      if constexpr (kReadAhead) this->read_statistics(delta[part], 1, part, now);
      pack_operand<Element>(p_operand[part], p + part * kPartLogits);
      this->begin(part, dv, p_operand[part]);
      Part::start_pv(dv, p_operand[part], dout + part * kPartSize);
      if (part == 0) Product::template wait<1>(dp);
      if constexpr (!kReadAhead) this->read_statistics(delta[part], 1, part, now);
      if (kReadAhead && part + 1 < kParts) this->read_statistics(lse2[part + 1], 0, part + 1, now);
      this->template logits_gradients<kPartial>(p, dp, part, delta[part]);
      pack_operand<Element>(ds_operand[part], p + part * kPartLogits);
      this->begin(part, dk, ds_operand[part]);
      Part::start_pv(dk, ds_operand[part], q + part * kPartSize);
      if (kDq && part == 0) {
        dq_by_key.await_before(me);
        dq_by_key.start(me, item, at.stage(), dq);
      }
      dq_by_key.store_ds(me, part, ds_operand[part]);
    }
    // Products are waited for in their order: with several parts, that of dq is before the last.
    if constexpr (kDq && kParts > 1) {
      Product::template wait<2>(dq);
      dq_by_key.finish(me, item, at.stage(), dq);
    }
    if (!loaded) {
      me.await_tile(0, n + 1 < total, tile.plus(1));
      me.await_tile(1, n + 1 < total, tile.plus(1));
    }
    constexpr int kBeside = kDq && kParts == 1;
    Product::template wait<1 + kBeside>(dv);
    me.release(team.free[1][now]);
    Product::template wait<kBeside>(dk);
    me.release(team.free[0][now]);
    if constexpr (kBeside) {
      Product::template wait<0>(dq);
      dq_by_key.finish(me, item, at.stage(), dq);
    }
    dq_by_key.template end_step<kPartial>(entry);
    tile = tile.plus(1);
  }

  // To the logits of a step; its tile is free then.
  __device__ __forceinline__ void add_bias(float (&logits)[kLogits]) const {
    auto &bias = me.team.bias;
    bias.full.wait(tile.count % 2);
    const SharedBiasByKey<Element, kConfig.tile> values{me.team.dq.bias[me.warpgroup], me.thread / 32 * 16,
                                                        me.thread % 32};
    values.add_to(logits, me.params.inverse_scale);
    me.release(bias.free);
  }
};

}  // namespace jsparse
