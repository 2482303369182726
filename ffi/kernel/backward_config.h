// How a backward kernel is built, and which build takes which sizes. Host and device read it.
#pragma once

namespace jsparse {

// A CTA is one load warpgroup and `teams` teams of block_rows / 64 compute warpgroups, each with
// tiles, barriers and a schedule of its own.
struct BackwardConfig {
  bool keys;           // whether rows are keys, for dk and dv, and not queries, for dq
  int head_dim;
  int block_rows;      // of an item
  int tile;            // columns of one step; divides the columns of a block
  int num_stages;      // tiles of columns in flight
  int num_row_stages;  // tiles of rows in flight
  int teams;
  bool turns;          // whether a team's two warpgroups take turns on the tensor core
  bool bias;           // whether logits have a bias
  bool all;            // whether a kernel for dk and dv computes dq too
  int num_dq_stages;   // then, dq on their way to their sums

  constexpr int warpgroups() const { return block_rows / 64; }
  constexpr int compute_warpgroups() const { return teams * warpgroups(); }
  constexpr int threads() const { return 128 * (compute_warpgroups() + 1); }
  // Registers a thread, of at most two compute warpgroups: all that ptxas may give a thread, or some
  // more for the load warps, where these were measured to be slower with few.
  constexpr bool spare_load() const { return bias || (keys && head_dim == 32); }
  constexpr int load_registers() const { return spare_load() ? 40 : 24; }
  constexpr int compute_registers() const { return spare_load() ? 232 : 240; }
  constexpr int walker(int cta, int team) const { return cta * teams + team; }
};

constexpr bool has_backward_kernel(int head_dim, int block_rows, int block_columns) {
  return (head_dim == 32 || head_dim == 64 || head_dim == 128) &&
         (block_rows == 64 || block_rows == 128) && (block_columns == 64 || block_columns == 128);
}

// Whether one kernel computes all gradients; beside a bias, up to D 64.
constexpr bool has_all_kernel(int head_dim, int block_q, int block_kv, bool bias = false) {
  return has_backward_kernel(head_dim, block_kv, block_q) && block_q == 128 && block_kv == 128 &&
         (!bias || head_dim <= 64);
}

// The config for sizes that have a kernel: tiles, teams and turns of the Mosaic kernels' winners
// (pallas_kernels/README.md), and the stages that shared memory holds; none has been timed here.
//
// A step holds logits, dp and the sums in registers: tiles of 128 columns beside sums of 64.
constexpr BackwardConfig choose_backward(bool keys, int head_dim, int block_rows,
                                         int block_columns, bool bias = false, bool all = false) {
  bool narrow = head_dim <= 64, high = block_rows == 128;
  int tile = narrow && high && block_columns == 128 ? 128 : 64;
  int stages = high && !narrow ? 3 : 4, teams = narrow && !high ? 2 : 1;
  bool turns = !keys && head_dim == 32 && high;
  // All gradients fill the shared memory above D 32; a bias's tile takes a stage or a dq.
  const bool full = all && head_dim > 32;
  if (full) stages = 2;
  if (all && bias && !full) stages = 3;
  const int row_stages = full ? 1 : 2, dq_stages = full && bias ? 1 : 2;
  return {keys, head_dim, block_rows, tile, stages, row_stages, teams, turns, bias, all, dq_stages};
}

}  // namespace jsparse
