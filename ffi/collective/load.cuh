// The load warp of a team: one thread fetches with TMA what the team's items need, in their order.
#pragma once

#include "collective/bias.cuh"
#include "collective/tiles.cuh"
#include "collective/tma.cuh"
#include "kernel/params.h"

namespace jsparse {

// `rows` tokens of one head, box by box, to where the layouts of T look for them.
template <class T, class Element>
__device__ void copy_tile(const CUtensorMap &map, Barrier &full, Element *to, int rows, int head,
                          int token, int batch) {
  for (int column = 0; column < T::kDim; column += T::kBoxColumns) {
    copy_box(map, full, to + column * rows, column, head, token, batch);
  }
}

template <class Element, TileConfig kConfig>
struct Load {
  using T = Tiles<Element, kConfig.head_dim, kConfig.tile_kv>;
  using Team = TeamStorage<Element, kConfig>;

  const ForwardParams &params;
  Team &team;
  int team_index;

  // All items of one worker.
  __device__ void run(int worker) {
    prefetch_map(params.q);
    prefetch_map(params.k);
    prefetch_map(params.v);
    if constexpr (kConfig.bias_size > 0) prefetch_map(params.bias);
    const jsparse_schedule &schedule = params.args.schedule;
    const int32_t *fields =
        schedule.items + int64_t(worker) * schedule.items_per_worker * JSPARSE_ITEM_FIELDS;
    Position<kConfig.num_q_stages> at;
    Position<kConfig.num_stages> tile;
    for (int count = schedule.item_count[worker]; count > 0; --count) {
      team.q_free[at.stage()].wait(at.parity() ^ 1);
      for (int i = 0; i < JSPARSE_ITEM_FIELDS; ++i) team.item[at.stage()][i] = fields[i];
      Item item{team.item[at.stage()]};
      load_queries(item, at.stage());
      load_blocks(item, tile);
      at = at.plus(1);
      fields += JSPARSE_ITEM_FIELDS;
    }
  }

 private:
  // Also tells the team of the item, which may have no blocks.
  __device__ void load_queries(const Item &item, int stage) {
    auto &full = team.q_full[stage];
    if (item.num_blocks() == 0) {
      full.arrive();
      return;
    }
    full.arrive_and_expect(kConfig.warpgroups() * T::kRowBytes);
    for (int w = 0; w < kConfig.warpgroups(); ++w) {
      int token = item.row() * kConfig.tile_q + w * 64;
      copy_tile<T>(params.q, full, team.q[stage][w], 64, item.head(), token, item.batch());
    }
  }

  // A stage has the keys of a step and the values of the one before; after the last step comes one with its
  // values alone. Entries are read as they are needed: the warp is as many steps ahead as there are
  // stages, and has no registers to spare.
  __device__ void load_blocks(const Item &item, Position<kConfig.num_stages> &tile) {
    const jsparse_forward_args &args = params.args;
    const int kv_head = item.head() / (args.num_heads / args.num_kv_heads);
    const int halves = args.block_kv > kConfig.tile_kv;  // a block is one step, or two
    const int steps = item.num_blocks() << halves, first = kConfig.first_step(team_index);
    if (first >= steps) return;
    const int bias = kConfig.bias_size > 0 ? bias_of_item(args.bias, item) : 0;
    int token = 0;
    bool keys = true;
    for (int n = first; keys; n += kConfig.stride(), tile = tile.plus(1)) {
      keys = n < steps;
      const int stage = tile.stage(), values_from = token;
      const bool values = n > first;
      auto &full = team.full[stage];
      int entry = 0;
      if (keys) {
        entry = entry_of(args.schedule, item, n >> halves);
        token = block_of(entry) * args.block_kv + (n & halves) * kConfig.tile_kv;
      }
      team.free[stage].wait(tile.parity() ^ 1);
      if (keys) team.entry[stage] = entry;
      full.arrive_and_expect((keys + values) * T::kColumnBytes + keys * bias_bytes());
      if (keys) load(params.k, full, team.k[stage], item, kv_head, token);
      if (values) load(params.v, full, team.v[stage], item, kv_head, values_from);
      if constexpr (kConfig.bias_size > 0) {
        if (keys) load_bias(full, stage, item, bias_array(args.bias, item, bias, n >> halves), token);
      }
    }
  }

  // Of a step; a bias by key has one row.
  __device__ uint32_t bias_bytes() const {
    const int rows = params.args.bias.rows == 1 ? 1 : kConfig.tile_q;
    return rows * kConfig.tile_kv * kConfig.bias_size;
  }

  __device__ void load_bias(Barrier &full, int stage, const Item &item, int array, int token) {
    const jsparse_bias &bias = params.args.bias;
    constexpr int kBoxColumns = 128 / kConfig.bias_size;
    int row = bias.rows == 1 ? 0 : item.row() * kConfig.tile_q;
    enter_array(bias, row, token);
    for (int column = 0; column < kConfig.tile_kv; column += kBoxColumns) {
      char *to = team.bias.tile[stage] + column * kConfig.tile_q * kConfig.bias_size;
      copy_box(params.bias, full, to, token + column, row, array);
    }
  }

  __device__ void load(const CUtensorMap &map, Barrier &full, Element *to, const Item &item, int head,
                       int token) {
    copy_tile<T>(map, full, to, kConfig.tile_kv, head, token, item.batch());
  }
};

}  // namespace jsparse
