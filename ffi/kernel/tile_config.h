// How a forward kernel is built, and which build takes which sizes. Host and device read it.
#pragma once

namespace jsparse {

// A CTA is one load warpgroup and `teams` teams of block_q / 64 compute warpgroups. A team walks a
// schedule of its own, with tiles and barriers of its own.
struct TileConfig {
  int head_dim;
  int block_q;
  int tile_kv;           // keys of one step; divides block_kv
  int num_stages;        // key and value tiles in flight
  int teams;
  bool turns;            // whether a team's two warpgroups take turns on the tensor core
  float lazy;            // powers of two that a row maximum must grow by before sums are rescaled
  int polynomial_every;  // every n-th exponential is computed by FMA, not MUFU; 0: none

  static constexpr int num_q_stages = 2;

  constexpr int warpgroups() const { return block_q / 64; }
  constexpr int compute_warpgroups() const { return teams * warpgroups(); }
  constexpr int threads() const { return 128 * (compute_warpgroups() + 1); }
  // What 24 registers a thread of the load warpgroup leave of 65536.
  constexpr int compute_registers() const {
    return compute_warpgroups() <= 2 ? 240 : compute_warpgroups() == 3 ? 160 : 112;
  }
};

constexpr bool has_kernel(int head_dim, int block_q, int block_kv) {
  return (head_dim == 32 || head_dim == 64 || head_dim == 128) &&
         (block_q == 64 || block_q == 128) && (block_kv == 64 || block_kv == 128);
}

// The config for sizes that have a kernel: those that won with the Mosaic kernels, which are built
// alike (pallas_kernels/README.md). None of them has been timed here.
//
// Up to D 64 two teams hide each other's chain from logits to probabilities. At D 128 a sum and a
// tile of logits fill the registers that one team of two warpgroups has.
constexpr TileConfig choose(int head_dim, int block_q, int block_kv) {
  if (head_dim < 128) return {head_dim, block_q, 64, 4, 2, false, 8.0f, 0};
  if (block_q == 64) return {head_dim, block_q, 64, 2, 2, false, 8.0f, 0};
  if (block_kv == 64) return {head_dim, block_q, 64, 4, 1, true, 8.0f, 0};
  return {head_dim, block_q, 128, 2, 1, true, 8.0f, 0};
}

}  // namespace jsparse
