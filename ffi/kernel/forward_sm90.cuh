// The forward kernel: persistent CTAs of one load warpgroup and teams of compute warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "collective/compute.cuh"
#include "collective/load.cuh"

namespace jsparse {

template <jsparse_dtype kDtype, int kHeadDim, int kBlockQ, int kBlockKv>
__global__ void __launch_bounds__(choose(kHeadDim, kBlockQ, kBlockKv).threads(), 1)
    forward_sm90(const __grid_constant__ ForwardParams params) {
  using Element = ElementOf<kDtype>;
  constexpr TileConfig kConfig = choose(kHeadDim, kBlockQ, kBlockKv);
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
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (warp < kConfig.teams && threadIdx.x % 32 == 0) {
      Load<Element, kConfig>{params, shared.team[warp]}.run(blockIdx.x * kConfig.teams + warp);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConfig.compute_registers()>();
    int team = warpgroup / kConfig.warpgroups();
    Compute<Element, kConfig> compute{params, shared.team[team], team,
                                      warpgroup % kConfig.warpgroups(), int(threadIdx.x % 128)};
    compute.run(blockIdx.x * kConfig.teams + team);
  }
}

template <jsparse_dtype kDtype, int kHeadDim, int kBlockQ, int kBlockKv>
cudaError_t launch(const ForwardParams &params, cudaStream_t stream) {
  constexpr TileConfig kConfig = choose(kHeadDim, kBlockQ, kBlockKv);
  constexpr int kBytes = sizeof(SharedStorage<ElementOf<kDtype>, kConfig>);
  static_assert(kBytes <= 227 * 1024, "a multiprocessor has 227 KB of shared memory");
  auto *kernel = &forward_sm90<kDtype, kHeadDim, kBlockQ, kBlockKv>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<params.args.num_workers / kConfig.teams, kConfig.threads(), kBytes, stream>>>(params);
  return cudaGetLastError();
}

// Key blocks of 64 have a kernel of their own only where those of 128 are computed in one step.
template <jsparse_dtype kDtype, int kHeadDim>
cudaError_t launch_forward(const ForwardParams &params, cudaStream_t stream) {
  if (params.args.block_q == 64) return launch<kDtype, kHeadDim, 64, 128>(params, stream);
  if constexpr (choose(kHeadDim, 128, 128).tile_kv > 64) {
    if (params.args.block_kv == 64) return launch<kDtype, kHeadDim, 128, 64>(params, stream);
  }
  return launch<kDtype, kHeadDim, 128, 128>(params, stream);
}

}  // namespace jsparse
