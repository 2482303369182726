// What the kernels for dq and for dk and dv share: what lies in shared memory, and what a thread of a
// compute warpgroup knows of its place.
//
// Rows are queries and columns keys for dq, the reverse for dk and dv. A token has two tiles: the
// first, q or k, makes the logits, the second, dout or v, the gradient of the probabilities.
#pragma once

#include "collective/bias.cuh"
#include "collective/element_mask.cuh"
#include "collective/epilogue.cuh"
#include "collective/products.cuh"
#include "collective/tiles.cuh"
#include "kernel/backward_config.h"
#include "kernel/params.h"

namespace jsparse {

// What a kernel of all gradients has besides: ds of two steps, and dq of one or two on its way to its sum.
template <class Element, BackwardConfig kConfig>
struct alignas(1024) DqTiles {
  using Product = DqProduct<Element, kConfig.head_dim, kConfig.bias>;
  Element ds[2][kConfig.tile / 64][2][Product::kTile];
  float dq[kConfig.num_dq_stages][2][Product::kSums * 128];  // of each step, of each warpgroup
};
// And the bias of a step, for the keys of each warpgroup.
template <class Element, BackwardConfig kConfig>
struct DqAndBiasTiles : DqTiles<Element, kConfig> {
  alignas(1024) char bias[2][kConfig.tile * 128];
};
struct NoDqTiles {};

// Barriers of the bias's tile; and of ds, completed by the thread that sends it to the bias's gradient.
struct BiasBarriers {
  Barrier full, free, ds_free[2];
};

// Of one team; barriers as in TeamStorage.
template <class Element, BackwardConfig kConfig>
struct alignas(1024) BackwardStorage {
  static constexpr int kRows = kConfig.num_row_stages, kColumns = kConfig.num_stages;
  static constexpr int kStatistics = kConfig.keys ? kConfig.tile : 4;

  alignas(1024) Element rows[2][kRows][kConfig.warpgroups()][64 * kConfig.head_dim];
  alignas(1024) Element columns[2][kColumns][kConfig.tile * kConfig.head_dim];
  // Of the queries of a tile of columns: lse2 beside the first tile, delta beside the second.
  alignas(16) float statistics[2][kColumns][kStatistics];
  alignas(16) int32_t item[kRows][JSPARSE_ITEM_FIELDS];
  int32_t entry[kColumns];
  Barrier rows_full[kRows], rows_free[kRows];
  Barrier full[2][kColumns], free[2][kColumns];
  // Which array of the bias each tile of columns has, see bias_array; or, where all gradients are computed:
  static constexpr bool kBiasTile = kConfig.all && kConfig.bias;
  cute::conditional_t<kBiasTile, BiasBarriers, int32_t[kConfig.bias ? kColumns : 1]> bias;

  Barrier ds_full[2], dq_full[2], dq_free[2];
  using WithDq = cute::conditional_t<kBiasTile, DqAndBiasTiles<Element, kConfig>, DqTiles<Element, kConfig>>;
  cute::conditional_t<kConfig.all, WithDq, NoDqTiles> dq;

  __device__ void init_barriers() {
    constexpr int kWarps = 4 * kConfig.warpgroups();
    for (int i = 0; i < kRows; ++i) {
      rows_full[i].init(1);
      rows_free[i].init(kWarps);
    }
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < kColumns; ++i) {
        full[which][i].init(1);
        free[which][i].init(kWarps);
      }
    }
    for (int i = 0; i < 2 && kConfig.all; ++i) {
      ds_full[i].init(kWarps);
      dq_full[i].init(kWarps);
      dq_free[i].init(1);
    }
    if constexpr (kBiasTile) {
      bias.full.init(1);
      bias.free.init(kWarps);
      for (int i = 0; i < 2; ++i) bias.ds_free[i].init(1);
    }
  }
};

template <class Element, BackwardConfig kConfig>
struct BackwardThread {
  using T = Tiles<Element, kConfig.head_dim, kConfig.tile>;
  using Team = BackwardStorage<Element, kConfig>;
  using Mask = ElementMask<kConfig.tile>;

  const BackwardParams &params;
  Team &team;
  int team_index;
  int warpgroup;  // of the team
  int thread;     // of the warpgroup

  // ----------------------------------------------------------------------------- place

  __device__ int steps_per_block() const { return params.sizes.block_columns / kConfig.tile; }

  // The thread's first row in its item's row of blocks.
  __device__ int row_in_block() const { return warpgroup * 64 + first_row(thread); }

  // First column of step n, of the block of a list entry.
  __device__ int first_of_step(int n, int entry) const {
    return block_of(entry) * params.sizes.block_columns + n % steps_per_block() * kConfig.tile;
  }

  // The first row and column that the thread holds of a step.
  __device__ Place place_of(const Item &item, int n, int entry) const {
    return {item.batch(), item.row() * kConfig.block_rows + row_in_block(),
            first_of_step(n, entry) + first_column(thread)};
  }

  __device__ BiasTile bias_of(const Item &item, int n, int entry, int stage) const {
    return {params.args.bias, team.bias[stage], place_of(item, n, entry)};
  }

  // ------------------------------------------------------------------- partial blocks

  __device__ Mask test_elements(const Item &item, int n, int entry) const {
    Place place = place_of(item, n, entry);
    int block = n / steps_per_block();
    if constexpr (kConfig.all) block = item.round(block, item.num_partial());
    return ElementTest<kConfig.tile>::at(params.args.elements, params.sizes, place,
                                         item.first_bits() + block);
  }

  // Sets bad columns of a step to zero in `tiles`: a NaN times a p or ds of 0 would reach rows that do
  // not see them. Rows that do get it from lse2 or delta.
  template <class... Tile>
  __device__ void clean(const Item &item, int n, int entry, Tile *...tiles) const {
    if (entry < JSPARSE_FLAGGED) return;
    sync_team();  // what the others read before is read
    int column = warpgroup * 128 + thread;
    if (column < kConfig.tile && bad_columns(item)[first_of_step(n, entry) + column] != 0) {
      (clear_token<T>(tiles, kConfig.tile, column), ...);
    }
    fence_async_shared();
    sync_team();
  }

  __device__ const int32_t *bad_columns(const Item &item) const {
    const jsparse_backward_args &args = params.args;
    int heads = kConfig.keys ? args.num_heads : args.num_kv_heads;
    int head = item.head() / (args.num_heads / heads);
    int64_t first = int64_t(item.batch()) * heads + head;
    return args.elements.bad + first * params.sizes.columns;
  }

  // --------------------------------------------------------------------------- results

  // The thread's two rows of a gradient, or of a part of it.
  template <int kSums>
  __device__ void store(const Item &item, const Gradient &to, const float (&sums)[kSums]) const {
    const jsparse_backward_args &args = params.args;
    int tokens = kConfig.keys ? args.kv_len : args.q_len;
    int heads = kConfig.keys ? args.num_kv_heads : args.num_heads;
    int head = item.head() / (args.num_heads / heads);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int in_block = row_in_block() + 8 * half;
      if (item.slot() >= 0) {
        int64_t at = int64_t(item.slot()) * kConfig.block_rows + in_block;
        store_part_row(to.part + at * to.size, half, thread, sums, to.scale, to.size);
      } else {
        int token = item.row() * kConfig.block_rows + in_block;
        int64_t at = (int64_t(item.batch()) * tokens + token) * heads + head;
        store_row(static_cast<Element *>(to.whole) + at * to.size, half, thread, sums, to.scale,
                  token < tokens ? to.size : 0);
      }
    }
  }

  // ------------------------------------------------------------------ synchronisation

  // Every warp tells of its own reads.
  __device__ void release(Barrier &barrier) const {
    __syncwarp();
    if (thread % 32 == 0) barrier.arrive();
  }

  // Waits for one of the tiles of a step, if there is one. A branch, which ptxas moves no wait for
  // products across; it would otherwise move it up into the arithmetic before.
  __device__ void await_tile(int which, bool exists, Position<kConfig.num_stages> step) const {
    if (exists) team.full[which][step.stage()].wait(step.parity());
  }

  // Whether the tiles of a step are there, if there is one.
  __device__ bool loaded(bool exists, Position<kConfig.num_stages> step) const {
    auto passed = [&](int which) { return team.full[which][step.stage()].passed(step.parity()); };
    return !exists || (passed(0) && passed(1));
  }

  __device__ void sync_team() const { sync_named(1 + team_index, kConfig.warpgroups() * 128); }

  // Turns on the tensor core; warpgroup 1 gives the first to warpgroup 0.
  __device__ void give_first_turn() const {
    if (kConfig.turns && warpgroup == 1) pass_turn();
  }
  __device__ void take_turn() const {
    if constexpr (kConfig.turns) sync_named(turn_barrier(warpgroup), 256);
  }
  __device__ void pass_turn() const {
    if constexpr (kConfig.turns) arrive_named(turn_barrier(1 - warpgroup), 256);
  }

 private:
  __device__ int turn_barrier(int of_warpgroup) const {
    return 1 + kConfig.teams + 2 * team_index + of_warpgroup;
  }
};

// Rounds logits' gradients or probabilities to the operand of a product; its registers are, pair by
// pair, those of the accumulator.
template <class Element, int kCount>
__device__ void pack_operand(uint32_t (&operand)[kCount], const float *values) {
  CUTE_UNROLL
  for (int i = 0; i < kCount; ++i) operand[i] = pack<Element>(values[2 * i], values[2 * i + 1]);
}

// ds = p (dp - delta). In a partial block it is 0 wherever p is, whatever the rest is: an element that
// does not count may have a NaN there.
template <bool kPartial>
__device__ float logits_gradient(float p, float dp, float delta) {
  float ds = p * (dp - delta);
  return kPartial && p == 0.0f ? 0.0f : ds;
}

}  // namespace jsparse
