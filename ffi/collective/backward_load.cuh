// The load warp of a team of a backward kernel: as Load, with two tiles of each token.
#pragma once

#include "collective/backward.cuh"
#include "collective/load.cuh"

namespace jsparse {

template <class Element, BackwardConfig kConfig>
struct BackwardLoad {
  using T = Tiles<Element, kConfig.head_dim, kConfig.tile>;
  using Team = BackwardStorage<Element, kConfig>;

  const BackwardParams &params;
  Team &team;

  // All items of one worker.
  __device__ void run(int worker) {
    for (int which = 0; which < 2; ++which) {
      prefetch_map(params.rows[which]);
      prefetch_map(params.columns[which]);
    }
    const jsparse_schedule &schedule = params.args.schedule;
    const int32_t *fields =
        schedule.items + int64_t(worker) * schedule.items_per_worker * JSPARSE_ITEM_FIELDS;
    Position<kConfig.num_row_stages> at;
    Position<kConfig.num_stages> step;
    for (int count = schedule.item_count[worker]; count > 0; --count) {
      team.rows_free[at.stage()].wait(at.parity() ^ 1);
      for (int i = 0; i < JSPARSE_ITEM_FIELDS; ++i) team.item[at.stage()][i] = fields[i];
      Item item{team.item[at.stage()]};
      load_rows(item, at.stage());
      load_columns(item, step);
      at = at.plus(1);
      fields += JSPARSE_ITEM_FIELDS;
    }
  }

 private:
  __device__ int kv_head(const Item &item) const {
    return item.head() / (params.args.num_heads / params.args.num_kv_heads);
  }

  // Also tells the team of the item, which may have no blocks.
  __device__ void load_rows(const Item &item, int stage) {
    auto &full = team.rows_full[stage];
    if (item.num_blocks() == 0) {
      full.arrive();
      return;
    }
    full.arrive_and_expect(2 * kConfig.warpgroups() * T::kRowBytes);
    int head = kConfig.keys ? kv_head(item) : item.head();
    for (int which = 0; which < 2; ++which) {
      for (int w = 0; w < kConfig.warpgroups(); ++w) {
        copy_tile<T>(params.rows[which], full, team.rows[which][stage][w], 64, head,
                     item.row() * kConfig.block_rows + w * 64, item.batch());
      }
    }
  }

  __device__ void load_columns(const Item &item, Position<kConfig.num_stages> &step) {
    const int head = kConfig.keys ? item.head() : kv_head(item);
    const int block_columns = params.sizes.block_columns;
    const int halves = block_columns > kConfig.tile;  // a block is one step, or two
    const int steps = item.num_blocks() << halves;
    const int bias = kConfig.bias ? bias_of_item(params.args.bias, item) : 0;
    for (int n = 0; n < steps; ++n) {
      int entry = kConfig.all ? entry_round(params.args.schedule, item, n >> halves)
                              : entry_of(params.args.schedule, item, n >> halves);
      int token = block_of(entry) * block_columns + (n & halves) * kConfig.tile;
      int stage = step.stage();
      for (int which = 0; which < 2; ++which) {
        auto &full = team.full[which][stage];
        team.free[which][stage].wait(step.parity() ^ 1);
        if (which == 0) {
          team.entry[stage] = entry;
          if constexpr (kConfig.bias && !kConfig.all) {
            team.bias[stage] = bias_array(params.args.bias, item, bias, n >> halves);
          }
        }
        if constexpr (kConfig.keys) {
          load_statistics(item, which, stage, token);
        } else {
          full.arrive_and_expect(T::kColumnBytes);
        }
        copy_tile<T>(params.columns[which], full, team.columns[which][stage], kConfig.tile, head,
                     token, item.batch());
      }
      if constexpr (kConfig.bias && kConfig.all) {
        static_assert(kConfig.tile == 128, "a step is a block");
        const int array = bias_array(params.args.bias, item, bias, round_of(item, n));
        load_bias(item, array, token, step.count);
      }
      step = step.plus(1);
    }
  }

  // The bias of a step, when that of the step before has been read: of a whole block.
  __device__ void load_bias(const Item &item, int array, int query, uint32_t step) {
    int key = item.row() * kConfig.block_rows;
    enter_array(params.args.bias, query, key);
    // One that nobody shares is read once.
    const uint64_t hint = params.bias_gradient != nullptr ? kStream : kKeep;
    team.bias.free.wait(step % 2 ^ 1);
    team.bias.full.arrive_and_expect(sizeof team.dq.bias);
    for (int w = 0; w < 2; ++w) {
      copy_box(params.bias, team.bias.full, team.dq.bias[w], key + w * 64, query, array, hint);
    }
  }

  // Of the queries of a step, beside one of their tiles.
  __device__ void load_statistics(const Item &item, int which, int stage, int query) {
    constexpr uint32_t kBytes = kConfig.tile * sizeof(float);
    const jsparse_backward_args &args = params.args;
    auto &full = team.full[which][stage];
    int64_t row = int64_t(item.batch()) * args.num_heads + item.head();
    const float *from = (which == 0 ? args.lse2 : args.delta) + row * params.sizes.columns + query;
    full.arrive_and_expect(T::kColumnBytes + kBytes);
    copy_words(full, team.statistics[which][stage], from, kBytes);
  }
};

}  // namespace jsparse
