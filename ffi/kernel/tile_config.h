// How a forward kernel is built, and which build takes which sizes. Host and device read it.
#pragma once

namespace jsparse {

// A CTA is one load warpgroup and `teams` teams of tile_q / 64 compute warpgroups, each with tiles and
// barriers of its own. A team walks a schedule of its own; or the teams walk one together, and each
// computes every teams-th step of an item.
struct TileConfig {
  int head_dim;
  int tile_q;            // query rows of an item; divides block_q
  int tile_kv;           // keys of one step; divides block_kv
  int num_stages;        // key and value tiles in flight
  int teams;
  bool share;            // whether the teams compute each item together
  bool turns;            // whether a team's two warpgroups take turns on the tensor core
  float lazy;            // powers of two that a row maximum must grow by before sums are rescaled
  bool guess;            // whether full blocks take the maximum of the steps before
  int polynomial_every;  // every n-th exponential is computed by FMA, not MUFU; 0: none
  int num_q_stages;      // items whose queries are in flight
  int bias_size;         // bytes of a value of the bias of the logits; 0: none

  constexpr int warpgroups() const { return tile_q / 64; }
  constexpr int compute_warpgroups() const { return teams * warpgroups(); }
  constexpr int threads() const { return 128 * (compute_warpgroups() + 1); }
  // Registers a thread; together they are no more than the CTA is launched with. The load threads of
  // teams of one warpgroup spill with 24.
  constexpr int load_registers() const {
    return compute_warpgroups() > 2 ? 32 : warpgroups() == 1 ? 40 : 24;
  }
  constexpr int compute_registers() const {
    if (compute_warpgroups() <= 2) return warpgroups() == 1 ? 232 : 240;
    return compute_warpgroups() == 3 ? 160 : 112;
  }

  // Whether queries are read from shared memory once an item, not at each step. At D 64 four warpgroups
  // have no registers for them.
  constexpr bool hold_queries() const { return head_dim != 64; }

  // Matrices of a bias, of 16 columns, read before products are waited for; more were slower.
  constexpr int bias_ahead() const { return head_dim == 32 ? 2 : 0; }

  // Walkers of a schedule in one CTA, and which of all a team of it is.
  constexpr int walkers() const { return share ? 1 : teams; }
  constexpr int walker(int cta, int team) const { return cta * walkers() + team % walkers(); }
  // The steps of an item that a team computes: its first, and from one to the next.
  constexpr int first_step(int team) const { return share ? team : 0; }
  constexpr int stride() const { return share ? teams : 1; }
};

constexpr bool has_kernel(int head_dim, int tile_q, int block_kv, bool share, int bias_size = 0) {
  return (head_dim == 32 || head_dim == 64 || head_dim == 128) &&
         (bias_size == 0 || ((bias_size == 2 || bias_size == 4) && !share)) &&
         (tile_q == 64 || (tile_q == 128 && !share) || (tile_q == 256 && bias_size > 0 && head_dim == 32)) &&
         (block_kv == 64 || block_kv == 128);
}

// Beside a bias, whose tiles are the largest: as many stages as shared memory holds.
constexpr TileConfig choose_with_bias(int head_dim, int tile_q, int block_kv, int bias_size) {
  const bool small = bias_size == 2;
  auto config = [&](int tile_kv, int stages, int teams, int q_stages, bool turns = false) {
    return TileConfig{head_dim, tile_q, tile_kv, stages, teams,    false,
                      turns,    8.0f,   true,    0,      q_stages, bias_size};
  };
  if (tile_q == 64) {
    if (head_dim == 32) return config(64, small ? 3 : 2, 4, 1);
    return config(64, 2, head_dim == 64 ? 3 : 2, small ? 2 : 1);
  }
  if (tile_q == 256) return config(64, small ? 4 : 2, 1, 2);
  if (head_dim == 32) return config(64, small ? 4 : 2, 2, 2);
  if (head_dim == 64) return config(64, small ? 3 : 2, 2, 1);
  if (small && block_kv == 128) return config(128, 2, 1, 1, true);
  return config(64, small ? 4 : 3, 1, 1, true);
}

// The config for sizes that have a kernel. With 128 rows an item, those that won with the Mosaic
// kernels, which are built alike (pallas_kernels/README.md); no others have been timed here.
//
// Up to D 64 several teams hide each other's chain from logits to probabilities. At D 128 a sum and
// a tile of logits fill the registers that two warpgroups have. The next item's queries are fetched ahead
// where there are many items.
constexpr TileConfig choose(int head_dim, int tile_q, int block_kv, bool share, int bias_size = 0) {
  if (bias_size > 0) return choose_with_bias(head_dim, tile_q, block_kv, bias_size);
  if (tile_q == 64) {
    int stages = head_dim == 32 ? 4 : 2, teams = head_dim < 128 ? 4 : 2;
    return {head_dim, tile_q, 64, stages, teams, share, false, 8.0f, true, 0, share ? 1 : 2, 0};
  }
  if (head_dim < 128) return {head_dim, tile_q, 64, 4, 2, false, false, 8.0f, true, 0, 2, 0};
  if (block_kv == 64) return {head_dim, tile_q, 64, 4, 1, false, true, 8.0f, true, 0, 2, 0};
  return {head_dim, tile_q, 128, 2, 1, false, true, 8.0f, true, 0, 2, 0};
}

}  // namespace jsparse
