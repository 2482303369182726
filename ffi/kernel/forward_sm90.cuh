// The forward kernel: persistent CTAs of one load warpgroup and teams of compute warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "collective/compute.cuh"
#include "collective/load.cuh"

namespace jsparse {

template <jsparse_dtype kDtype, int kHeadDim, int kTileQ, int kBlockKv, bool kShare, int kBiasSize>
__global__ void __launch_bounds__(choose(kHeadDim, kTileQ, kBlockKv, kShare, kBiasSize).threads(), 1)
    forward_sm90(const __grid_constant__ ForwardParams params) {
  using Element = ElementOf<kDtype>;
  constexpr TileConfig kConfig = choose(kHeadDim, kTileQ, kBlockKv, kShare, kBiasSize);
  extern __shared__ __align__(1024) char memory[];
  auto &shared = *reinterpret_cast<SharedStorage<Element, kConfig> *>(memory);
  constexpr int kComputeWarpgroups = kConfig.compute_warpgroups();
  int warpgroup = cutlass::canonical_warp_group_idx(), warp = threadIdx.x / 32 % 4;

  if (threadIdx.x < kConfig.teams) {
    shared.team[threadIdx.x].init_barriers();
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == kComputeWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<kConfig.load_registers()>();
    if (warp < kConfig.teams && threadIdx.x % 32 == 0) {
      Load<Element, kConfig>{params, shared.team[warp], warp}.run(kConfig.walker(blockIdx.x, warp));
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConfig.compute_registers()>();
    int team = warpgroup / kConfig.warpgroups();
    Compute<Element, kConfig> compute{params, shared, team, warpgroup % kConfig.warpgroups(),
                                      int(threadIdx.x % 128)};
    compute.run(kConfig.walker(blockIdx.x, team));
  }
}

template <jsparse_dtype kDtype, int kHeadDim, int kBiasSize, int kTileQ, int kBlockKv, bool kShare = false>
cudaError_t launch(const ForwardParams &params, cudaStream_t stream) {
  constexpr TileConfig kConfig = choose(kHeadDim, kTileQ, kBlockKv, kShare, kBiasSize);
  constexpr int kBytes = sizeof(SharedStorage<ElementOf<kDtype>, kConfig>);
  static_assert(kBytes <= 227 * 1024, "a multiprocessor has 227 KB of shared memory");
  auto *kernel = &forward_sm90<kDtype, kHeadDim, kTileQ, kBlockKv, kShare, kBiasSize>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<params.args.schedule.num_workers / kConfig.walkers(), kConfig.threads(), kBytes, stream>>>(params);
  return cudaGetLastError();
}

// Key blocks of 64 have a kernel of their own only where those of 128 are computed in one step.
template <jsparse_dtype kDtype, int kHeadDim, int kBiasSize>
cudaError_t launch_forward(const ForwardParams &params, cudaStream_t stream) {
  const jsparse_forward_args &args = params.args;
  if constexpr (kBiasSize == 0) {
    if (args.share) return launch<kDtype, kHeadDim, kBiasSize, 64, 128, true>(params, stream);
  }
  if (args.tile_q == 64) return launch<kDtype, kHeadDim, kBiasSize, 64, 128>(params, stream);
  if constexpr (has_kernel(kHeadDim, 256, 128, false, kBiasSize)) {
    if (args.tile_q == 256) return launch<kDtype, kHeadDim, kBiasSize, 256, 128>(params, stream);
  }
  if constexpr (choose(kHeadDim, 128, 128, false, kBiasSize).tile_kv > 64) {
    if (args.block_kv == 64) return launch<kDtype, kHeadDim, kBiasSize, 128, 64>(params, stream);
  }
  return launch<kDtype, kHeadDim, kBiasSize, 128, 128>(params, stream);
}

}  // namespace jsparse
