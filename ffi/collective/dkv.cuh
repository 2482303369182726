// One compute warpgroup of the dk and dv kernel: 64 key rows of each item of its team.
//
// Everything is transposed, s = k q^T and dp = v dout^T, so that probabilities and the logits'
// gradient are left operands in registers: dv += p dout, dk += ds q. Sums of query heads that share
// a key head stay in registers from item to item.
#pragma once

#include "collective/backward.cuh"

namespace jsparse {

template <class Element, BackwardConfig kConfig>
struct ComputeDkv {
  using Thread = BackwardThread<Element, kConfig>;
  using Mask = typename Thread::Mask;
  using Product = Products<Element, kConfig.head_dim, kConfig.tile>;
  static constexpr int kLogits = Product::kLogits, kSums = Product::kSums;

  // A step's dv and dk are computed in parts of 64 columns: the products of one run beside the
  // arithmetic of the next. Tokens from 64 on are a tile of their own where a tile is one box.
  using Part = Products<Element, kConfig.head_dim, 64>;
  static constexpr int kParts = kConfig.tile / 64, kPartLogits = Part::kLogits;
  static constexpr int kPartSize = 64 * kConfig.head_dim;
  static_assert(kParts == 1 || Thread::T::kBoxColumns == kConfig.head_dim);

  // lse2 or delta of the thread's columns of a part.
  using Statistics = float2[kPartLogits / 4];
  // Whether they are read before products are waited for: they would wait for shared memory, which the
  // products of the other warpgroup keep busy. Steps of one part have no registers for it.
  static constexpr bool kReadAhead = kParts > 1 && kConfig.head_dim == 64;

  Thread me;
  Position<kConfig.num_row_stages> at = {};  // the item
  Position<kConfig.num_stages> tile = {};    // the step

  __device__ void run(int worker) {
    auto &team = me.team;
    const int group = me.params.args.num_heads / me.params.args.num_kv_heads;
    float dk[kSums] = {}, dv[kSums] = {}, by_key[2];
    me.give_first_turn();
    for (int count = me.params.args.schedule.item_count[worker]; count > 0; --count) {
      team.rows_full[at.stage()].wait(at.parity());
      Item item{team.item[at.stage()]};
      const int in_group = item.head() % group;
      CUTE_UNROLL
      for (int i = 0; i < kSums; ++i) {
        dk[i] = in_group == 0 ? 0.0f : dk[i];
        dv[i] = in_group == 0 ? 0.0f : dv[i];
      }
      by_key[0] = by_key[1] = 0.0f;
      if (item.num_blocks() > 0) attend(item, dk, dv, by_key);
      if constexpr (kConfig.bias) {
        if (me.params.by_key.whole != nullptr) store_by_key(item, by_key);
      }
      if (in_group == group - 1) {
        me.store(item, me.params.first, dk);
        me.store(item, me.params.second, dv);
      }
      me.release(team.rows_free[at.stage()]);
      at = at.plus(1);
    }
  }

 protected:
  // Partial blocks come first, then full ones.
  __device__ void attend(const Item &item, float (&dk)[kSums], float (&dv)[kSums],
                         float (&by_key)[2]) {
    const int per_block = me.steps_per_block();
    const int partial = item.num_partial() * per_block;
    const int total = item.num_blocks() * per_block;
    me.await_tile(0, true, tile);
    me.await_tile(1, true, tile);
    int n = 0;
    for (; n < partial; ++n) step<true>(item, n, total, dk, dv, by_key);
    for (; n < total; ++n) step<false>(item, n, total, dk, dv, by_key);
  }

  template <bool kPartial>
  __device__ void step(const Item &item, int n, int total, float (&dk)[kSums],
                       float (&dv)[kSums], float (&by_key)[2]) {
    auto &team = me.team;
    const int now = tile.stage(), entry = team.entry[now];
    Element *q = team.columns[0][now], *dout = team.columns[1][now];
    float p[kLogits], dp[kLogits];
    uint32_t p_operand[kParts][kPartLogits / 2], ds_operand[kParts][kPartLogits / 2];
    // Before the products, whose results would take the registers that the test needs.
    Mask mask;
    if constexpr (kPartial) {
      me.clean(item, n, entry, q, dout);
      mask = me.test_elements(item, n, entry);
    }
    if constexpr (kConfig.bias) {
      auto bias = me.bias_of(item, n, entry, now);
      bias.template load_transposed<kPartial>(p, me.params.inverse_scale);
      Product::begin_onto(p);
    }
    me.take_turn();
    Product::begin();
    Product::template start_qk<kConfig.bias>(p, team.rows[0][at.stage()][me.warpgroup], q);
    Product::start_qk(dp, team.rows[1][at.stage()][me.warpgroup], dout);
    me.pass_turn();

    Statistics lse2[kParts], delta[kParts];
    if constexpr (kReadAhead) read_statistics(lse2[0], 0, 0, now);
    Product::template wait<1>(p);
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if constexpr (!kReadAhead) read_statistics(lse2[part], 0, part, now);
      probabilities<kPartial>(p, part, mask, lse2[part]);
      if constexpr (kReadAhead) read_statistics(delta[part], 1, part, now);
      pack_operand<Element>(p_operand[part], p + part * kPartLogits);
      begin(part, dv, p_operand[part]);
      Part::start_pv(dv, p_operand[part], dout + part * kPartSize);
      if (part == 0) Product::template wait<1>(dp);
      if constexpr (!kReadAhead) read_statistics(delta[part], 1, part, now);
      if (kReadAhead && part + 1 < kParts) read_statistics(lse2[part + 1], 0, part + 1, now);
      logits_gradients<kPartial>(p, dp, part, delta[part]);
      if constexpr (kConfig.bias) {
        if (me.params.by_key.whole != nullptr) add_rows(by_key, p, part);
      }
      pack_operand<Element>(ds_operand[part], p + part * kPartLogits);
      begin(part, dk, ds_operand[part]);
      Part::start_pv(dk, ds_operand[part], q + part * kPartSize);
    }
    me.await_tile(0, n + 1 < total, tile.plus(1));
    me.await_tile(1, n + 1 < total, tile.plus(1));
    Product::template wait<1>(dv);
    me.release(team.free[1][now]);
    Product::template wait<0>(dk);
    me.release(team.free[0][now]);
    tile = tile.plus(1);
  }

  // From the second part on, the product before adds to the same sums.
  __device__ static void begin(int part, float (&sums)[kSums],
                               uint32_t (&operand)[kPartLogits / 2]) {
    if (part == 0) {
      Part::begin(sums, operand);
    } else {
      Part::begin(operand);
    }
  }

  // Of the part's logits, in their place.
  template <bool kPartial>
  __device__ void probabilities(float (&s)[kLogits], int part, const Mask &mask,
                                const Statistics &of_part) const {
    CUTE_UNROLL
    for (int i = part * kPartLogits; i < (part + 1) * kPartLogits; i += 4) {
      float2 lse2 = of_part[i % kPartLogits / 4];
      CUTE_UNROLL
      for (int j = i; j < i + 4; ++j) {
        float x = exp2_mufu(fmaf(s[j], me.params.scale_log2, j % 2 ? -lse2.y : -lse2.x));
        s[j] = !kPartial || mask.counts(j) ? x : 0.0f;  // lse2 may be NaN
      }
    }
  }

  // Of the part's probabilities, in their place.
  template <bool kPartial>
  __device__ void logits_gradients(float (&p)[kLogits], const float (&dp)[kLogits], int part,
                                   const Statistics &of_part) const {
    CUTE_UNROLL
    for (int i = part * kPartLogits; i < (part + 1) * kPartLogits; i += 4) {
      float2 delta = of_part[i % kPartLogits / 4];
      CUTE_UNROLL
      for (int j = i; j < i + 4; ++j) {
        p[j] = logits_gradient<kPartial>(p[j], dp[j], j % 2 ? delta.y : delta.x);
      }
    }
  }

  // Adds a part's ds to the sums of the thread's two rows.
  __device__ static void add_rows(float (&sums)[2], const float (&ds)[kLogits], int part) {
    CUTE_UNROLL
    for (int i = part * kPartLogits; i < (part + 1) * kPartLogits; ++i) sums[i >> 1 & 1] += ds[i];
  }

  // The sums of the thread's two rows, which are spread over the lanes of a quad, or parts of them.
  __device__ void store_by_key(const Item &item, const float (&sums)[2]) const {
    const jsparse_backward_args &args = me.params.args;
    const Gradient &to = me.params.by_key;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = across_quad(sums[half], Add{});
      int in_block = me.row_in_block() + 8 * half;
      int token = item.row() * kConfig.block_rows + in_block;
      if (me.thread % 4 != 0) continue;
      if (item.slot() >= 0) {
        to.part[int64_t(item.slot()) * kConfig.block_rows + in_block] = total;
      } else if (token < args.kv_len) {
        int64_t at = (int64_t(item.batch()) * args.kv_len + token) * args.num_heads + item.head();
        static_cast<float *>(to.whole)[at] = total;
      }
    }
  }

  // lse2 (0) or delta (1).
  __device__ void read_statistics(Statistics &to, int which, int part, int stage) const {
    const float *first = me.team.statistics[which][stage] + first_column(me.thread) + part * 64;
    CUTE_UNROLL
    for (int i = 0; i < kPartLogits / 4; ++i) to[i] = *reinterpret_cast<const float2 *>(first + 8 * i);
  }
};

}  // namespace jsparse
