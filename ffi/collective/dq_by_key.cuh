// dq in the kernel of all gradients, whose rows are keys: ds of a step goes through shared memory, to be
// the left operand of ds^T k, and the product to float32 sums in global memory.
//
// dq of a step is computed beside the next step, when both warpgroups have written their ds.
#pragma once

#include "collective/backward.cuh"
#include "collective/tma.cuh"

namespace jsparse {

// What a compute warpgroup does for it.
template <class Element, BackwardConfig kConfig>
struct DqByKey {
  using Thread = BackwardThread<Element, kConfig>;
  using T = typename Thread::T;
  using Product = DqProduct<Element, kConfig.head_dim, kConfig.bias>;
  using Sums = float[Product::kSums];

  Position<2> step = {};  // of ds; of dq: the one before
  Position<2> sent = {};  // a dq
  bool stored = false;    // whether there is a dq that is not sent
  bool bad_keys = false;  // whether the step before has keys to clear

  // Part `part` of a step's ds. The step before it must be complete: see await_before; and what was there
  // sent to the gradient of a bias.
  __device__ void store_ds(const Thread &me, int part, uint32_t (&ds)[16]) const {
    if constexpr (kConfig.bias) {
      const bool sent = part > 0 || me.params.bias_gradient == nullptr;
      if (!sent) me.team.bias.ds_free[step.stage()].wait(step.parity() ^ 1);
    }
    Product::store_ds(me.team.dq.ds[step.stage()][part][me.warpgroup], ds, me.thread);
  }

  // All of it is stored.
  template <bool kPartial>
  __device__ void end_step(int entry) {
    step = step.plus(1);
    bad_keys = kPartial && (entry & JSPARSE_FLAGGED_ROW);
  }

  // What the step before stored, its ds and perhaps a dq. Called when products were started, since the
  // fence waits until all is stored.
  __device__ void publish(const Thread &me) {
    fence_async_shared();
    me.release(me.team.ds_full[step.plus(-1).stage()]);
    if (stored) send(me);
  }
  __device__ void publish_last(const Thread &me) {
    fence_async_shared();
    send(me);
  }

  // Until ds of the step before is complete; then dq of the one before that is too, in both warpgroups,
  // and its place is free.
  __device__ void await_before(const Thread &me) const {
    auto before = step.plus(-1);
    me.team.ds_full[before.stage()].wait(before.parity());
  }

  // dq of the step before.
  __device__ void start(const Thread &me, const Item &item, int row_stage, Sums &dq) const {
    if (bad_keys) write_bad_keys(me, item, row_stage, Clear{});
    constexpr bool kHalves = kConfig.tile == 64;  // of the columns
    auto &rows = me.team.rows[0][row_stage];
    Element *k = rows[0] + (kHalves ? me.warpgroup * 64 * 64 : 0);
    Element *ds = me.team.dq.ds[step.plus(-1).stage()][kHalves ? 0 : me.warpgroup][0];
    Products<Element, kConfig.head_dim, kConfig.tile>::begin();
    Product::start(dq, ds, k, 64 * kConfig.head_dim);
  }

  // After it was waited for: stores it for the thread that sends it to its sum.
  __device__ void finish(const Thread &me, const Item &item, int row_stage, const Sums &dq) {
    if (bad_keys) write_bad_keys(me, item, row_stage, Restore{});
    const auto before = sent.plus(-kConfig.num_dq_stages);  // what was there
    me.team.dq_free[before.stage()].wait(before.parity());
    const int place = sent.count % kConfig.num_dq_stages;
    auto *to = reinterpret_cast<float4 *>(me.team.dq.dq[place][me.warpgroup]) + me.thread;
    CUTE_UNROLL
    for (int i = 0; i < Product::kSums; i += 4) {
      to[128 * (i / 4)] = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    stored = true;
  }

 private:
  __device__ void send(const Thread &me) {
    me.release(me.team.dq_full[sent.stage()]);
    sent = sent.plus(1);
    stored = false;
  }

  struct Clear {
    __device__ uint4 operator()(const uint4 *) const { return make_uint4(0, 0, 0, 0); }
  };
  struct Restore {
    __device__ uint4 operator()(const uint4 *from) const { return *from; }
  };

  // Keys that are not finite are zeros while dq of a partial block is computed: a NaN times a ds of 0
  // would reach queries that do not see them. Both warpgroups come here.
  template <class Value>
  __device__ void write_bad_keys(const Thread &me, const Item &item, int row_stage, Value value) const {
    const jsparse_backward_args &args = me.params.args;
    me.sync_team();
    int token = item.row() * kConfig.block_rows + me.warpgroup * 64 + me.thread;
    int head = item.head() / (args.num_heads / args.num_kv_heads);
    int64_t row = int64_t(item.batch()) * args.num_kv_heads + head;
    if (me.thread < 64 && me.params.turns.bad_keys[row * me.params.sizes.rows + token] != 0) {
      int64_t at = (int64_t(item.batch()) * args.kv_len + token) * args.num_kv_heads + head;
      auto *from = static_cast<const Element *>(args.k) + at * args.head_dim;
      for (int i = 0; i < args.head_dim; i += 8) {
        Element *box = me.team.rows[0][row_stage][me.warpgroup] + i / T::kBoxColumns * 64 * T::kBoxColumns;
        *place_in_box<T>(box, me.thread, i % T::kBoxColumns / 8) =
            value(reinterpret_cast<const uint4 *>(from + i));
      }
    }
    fence_async_shared();
    me.sync_team();
  }
};

// One of two threads that send dq to its sums, each step in its turn: every second step, so that the other
// has begun before what this one sent is there.
template <class Element, BackwardConfig kConfig>
struct SendDq {
  const BackwardParams &params;
  BackwardStorage<Element, kConfig> &team;
  int which;

  // All items of one worker.
  __device__ void run(int worker) const {
    const jsparse_schedule &schedule = params.args.schedule;
    const int32_t *fields =
        schedule.items + int64_t(worker) * schedule.items_per_worker * JSPARSE_ITEM_FIELDS;
    const int steps_per_block = params.sizes.block_columns / kConfig.tile;
    Position<2> at;
    for (int count = schedule.item_count[worker]; count > 0; --count) {
      Item item{fields};
      const int32_t *turn = params.turns.turns + 2 * int64_t(item.first_turn());
      for (int n = item.num_blocks() * steps_per_block; n > 0; --n) {
        if (at.stage() == which) send(turn[0], turn[1], at);
        at = at.plus(1);
        turn += 2;
      }
      fields += JSPARSE_ITEM_FIELDS;
    }
  }

 private:
  // The first part of a sum is what it starts from.
  __device__ void send(int sum, int turn, Position<2> at) const {
    constexpr int kCount = 2 * DqProduct<Element, kConfig.head_dim>::kSums * 128;
    float *to = params.turns.sums + int64_t(sum) * kCount;
    const float *dq = team.dq.dq[at.count % kConfig.num_dq_stages][0];
    team.dq_full[at.stage()].wait(at.parity());
    await_turn(&params.turns.taken[sum], turn);
    if (turn == 0) {
      copy_back(to, dq, kCount * sizeof(float));
    } else {
      add_back(to, dq, kCount * sizeof(float));
    }
    await_read();
    team.dq_free[at.stage()].arrive();
    await_written();
    pass_turn(&params.turns.taken[sum], turn);
  }
};

// The thread that sends ds of both warpgroups to the gradient of the bias, which has queries as rows. A step
// is a block.
template <class Element, BackwardConfig kConfig>
struct SendDs {
  const BackwardParams &params;
  BackwardStorage<Element, kConfig> &team;

  // All items of one worker.
  __device__ void run(int worker) const {
    const jsparse_schedule &schedule = params.args.schedule;
    const int32_t *fields =
        schedule.items + int64_t(worker) * schedule.items_per_worker * JSPARSE_ITEM_FIELDS;
    Position<2> at;
    for (int count = schedule.item_count[worker]; count > 0; --count) {
      Item item{fields};
      const int of_item = bias_of_item(params.args.bias, item);
      for (int n = 0; n < item.num_blocks(); ++n) {
        const int array = bias_array(params.args.bias, item, of_item, round_of(item, n));
        send(item, array, block_of(entry_round(schedule, item, n)), at);
        at = at.plus(1);
      }
      fields += JSPARSE_ITEM_FIELDS;
    }
  }

 private:
  __device__ void send(const Item &item, int array, int block, Position<2> at) const {
    int key = item.row() * kConfig.block_rows, query = block * kConfig.tile;
    enter_array(params.args.bias, query, key);
    team.ds_full[at.stage()].wait(at.parity());
    for (int part = 0; part < kConfig.tile / 64; ++part) {
      for (int w = 0; w < 2; ++w) {
        copy_box_back(params.bias_gradient_map, team.dq.ds[at.stage()][part][w], key + w * 64,
                      query + part * 64, array);
      }
    }
    await_read();
    team.bias.ds_free[at.stage()].arrive();
  }
};

// Adds up the sums of a tile of queries, and rounds dq.
template <class Element, int kHeadDim>
struct FinishDq {
  using Product = DqProduct<Element, kHeadDim>;
  static constexpr int kSums = Product::kSums;
  static constexpr bool kHalves = kHeadDim > 64;  // of the columns; else of the queries
  static constexpr int kTile = kHalves ? 64 : 128;

  const jsparse_backward_args &args;
  const jsparse_turns &turns;
  void *dq;

  // `place` counts tiles of [B, H, tiles]; 256 threads are as the two warpgroups.
  __device__ void run(int64_t place, int num_tiles, int index) const {
    int warpgroup = index / 128, thread = index % 128;
    const int32_t *sums_of = turns.sums_of + 2 * place;
    float total[kSums] = {};
    for (int n = 0; n < sums_of[1]; ++n) {
      int64_t half = (int64_t(sums_of[0]) + n) * 2 + warpgroup;
      auto *from = reinterpret_cast<const float4 *>(turns.sums) + half * kSums * 32 + thread;
      CUTE_UNROLL
      for (int i = 0; i < kSums; i += 4) {
        float4 x = from[128 * (i / 4)];
        total[i] += x.x, total[i + 1] += x.y, total[i + 2] += x.z, total[i + 3] += x.w;
      }
    }
    int64_t head = place / num_tiles % args.num_heads, batch = place / num_tiles / args.num_heads;
    int first = int(place % num_tiles) * kTile + (kHalves ? 0 : warpgroup * 64) + first_row(thread);
    int column = kHalves ? warpgroup * 64 : 0;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int token = first + 8 * half;
      int64_t at = ((batch * args.q_len + token) * args.num_heads + head) * args.head_dim;
      store_row(static_cast<Element *>(dq) + at + column, half, thread, total, args.scale,
                token < args.q_len ? args.head_dim - column : 0);
    }
  }
};

}  // namespace jsparse
