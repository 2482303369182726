// The backward kernels: persistent CTAs of one load warpgroup and teams of compute warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "collective/backward_load.cuh"
#include "collective/dkv.cuh"
#include "collective/dq.cuh"
#include "collective/gradients.cuh"

namespace jsparse {

template <class Element, BackwardConfig kConfig>
using ComputeBackward =
    cute::conditional_t<kConfig.all, ComputeGradients<Element, kConfig>,
                        cute::conditional_t<kConfig.keys, ComputeDkv<Element, kConfig>,
                                            ComputeDq<Element, kConfig>>>;

template <jsparse_dtype kDtype, bool kKeys, int kHeadDim, bool kBias, int kBlockRows, int kBlockColumns,
          bool kAll>
__global__ void __launch_bounds__(
    choose_backward(kKeys, kHeadDim, kBlockRows, kBlockColumns, kBias, kAll).threads(), 1)
    backward_sm90(const __grid_constant__ BackwardParams params) {
  using Element = ElementOf<kDtype>;
  constexpr BackwardConfig kConfig =
      choose_backward(kKeys, kHeadDim, kBlockRows, kBlockColumns, kBias, kAll);
  // Two warpgroups have all that a thread can name.
  constexpr bool kMove = kConfig.compute_warpgroups() > 1;
  extern __shared__ __align__(1024) char memory[];
  auto *shared = reinterpret_cast<BackwardStorage<Element, kConfig> *>(memory);
  int warpgroup = cutlass::canonical_warp_group_idx(), warp = threadIdx.x / 32 % 4;

  if (threadIdx.x < kConfig.teams) {
    shared[threadIdx.x].init_barriers();
    fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == kConfig.compute_warpgroups()) {
    if constexpr (kMove) cutlass::arch::warpgroup_reg_dealloc<kConfig.load_registers()>();
    if (warp < kConfig.teams && threadIdx.x % 32 == 0) {
      BackwardLoad<Element, kConfig>{params, shared[warp]}.run(kConfig.walker(blockIdx.x, warp));
    }
    if constexpr (kAll) {
      bool sends = warp == 1 || warp == 2;
      if (sends && threadIdx.x % 32 == 0) {
        SendDq<Element, kConfig>{params, shared[0], warp - 1}.run(blockIdx.x);
      }
      if constexpr (kConfig.bias) {
        if (warp == 3 && threadIdx.x % 32 == 0 && params.bias_gradient != nullptr) {
          SendDs<Element, kConfig>{params, shared[0]}.run(blockIdx.x);
        }
      }
    }
  } else {
    if constexpr (kMove) cutlass::arch::warpgroup_reg_alloc<kConfig.compute_registers()>();
    int team = warpgroup / kConfig.warpgroups();
    BackwardThread<Element, kConfig> me{params, shared[team], team, warpgroup % kConfig.warpgroups(),
                                        int(threadIdx.x % 128)};
    ComputeBackward<Element, kConfig> compute{me};
    compute.run(kConfig.walker(blockIdx.x, team));
  }
}

template <jsparse_dtype kDtype, bool kKeys, int kHeadDim, bool kBias, int kBlockRows, int kBlockColumns,
          bool kAll = false>
cudaError_t launch_backward_of(const BackwardParams &params, cudaStream_t stream) {
  constexpr BackwardConfig kConfig =
      choose_backward(kKeys, kHeadDim, kBlockRows, kBlockColumns, kBias, kAll);
  constexpr int kBytes = kConfig.teams * sizeof(BackwardStorage<ElementOf<kDtype>, kConfig>);
  static_assert(kBytes <= 227 * 1024, "a multiprocessor has 227 KB of shared memory");
  auto *kernel = &backward_sm90<kDtype, kKeys, kHeadDim, kBias, kBlockRows, kBlockColumns, kAll>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = params.args.schedule.num_workers / kConfig.teams;
  config.blockDim = kConfig.threads();
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  // CTAs that wait for one another run at a time, or none does.
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = kAll;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Blocks of 64 columns have a kernel of their own only where those of 128 are computed in one step.
template <jsparse_dtype kDtype, bool kKeys, int kHeadDim, bool kBias>
cudaError_t launch_backward_of(const BackwardParams &params, cudaStream_t stream) {
  if (params.sizes.block_rows == 64) {
    return launch_backward_of<kDtype, kKeys, kHeadDim, kBias, 64, 128>(params, stream);
  }
  if constexpr (choose_backward(kKeys, kHeadDim, 128, 128, kBias).tile > 64) {
    if (params.sizes.block_columns == 64) {
      return launch_backward_of<kDtype, kKeys, kHeadDim, kBias, 128, 64>(params, stream);
    }
  }
  return launch_backward_of<kDtype, kKeys, kHeadDim, kBias, 128, 128>(params, stream);
}

template <jsparse_dtype kDtype, int kHeadDim, bool kBias>
cudaError_t launch_backward(const BackwardParams &params, bool keys, cudaStream_t stream) {
  return keys ? launch_backward_of<kDtype, true, kHeadDim, kBias>(params, stream)
              : launch_backward_of<kDtype, false, kHeadDim, kBias>(params, stream);
}

template <jsparse_dtype kDtype, int kHeadDim, bool kBias>
cudaError_t launch_gradients(const BackwardParams &params, cudaStream_t stream) {
  return launch_backward_of<kDtype, true, kHeadDim, kBias, 128, 128, true>(params, stream);
}

}  // namespace jsparse
