// The baseline on a GPU: CUTLASS's grouped GEMM for Hopper, and the launches.
#include "baseline/grouped_gemm.h"

#include <cutlass/bfloat16.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/half.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "baseline/steps.cuh"

namespace jsparse {
namespace {

using cute::Int;
using cute::Shape;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

constexpr int kPrepareThreads = 256, kSoftmaxThreads = 128;

void check(cudaError_t status, const char *what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class Element>
__global__ void __launch_bounds__(kPrepareThreads) prepare(const GroupedGemmArgs args) {
  int n = blockIdx.x;
  Threads threads{int(threadIdx.x), kPrepareThreads};
  if (n < args.num_blocks) {
    prepare_block<Element>(args, n, threads);
  } else {
    prepare_row<Element>(args, n - args.num_blocks, threads);
  }
}

// The sum over all threads of the CTA, in a fixed order.
__device__ Sum of_all(Sum sum) {
  __shared__ Sum of_warp[kSoftmaxThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) {
    Sum other;
    other.top = __shfl_xor_sync(~0u, sum.top, distance);
    other.total = __shfl_xor_sync(~0u, sum.total, distance);
    sum.add(other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = of_warp[0];
  for (int i = 1; i < kSoftmaxThreads / 32; ++i) sum.add(of_warp[i]);
  return sum;
}

// A CTA computes one query of one head. The logits are read again from the cache.
template <class Element>
__global__ void __launch_bounds__(kSoftmaxThreads) softmax(const GroupedGemmArgs args) {
  int row = blockIdx.x / args.block_q, in_block = blockIdx.x % args.block_q, head = blockIdx.y;
  int keys = keys_of_row(args, row);
  if (keys == 0) return;
  int64_t start = start_of_row(args, head, row) + int64_t(in_block) * keys;
  const float *logits = args.logits + start;
  Threads threads{int(threadIdx.x), kSoftmaxThreads};
  Sum sum = of_all(sum_logits(logits, keys, args.scale_log2, threads));
  write_weights(logits, static_cast<Element *>(args.weights) + start, keys, args.scale_log2, sum,
                threads);
}

// d = a b in float32, rounded to Output. `LayoutB`: ColumnMajor is [n, k], RowMajor is [k, n].
template <class Element, class Output, class LayoutB, int kTileM, int kTileN>
struct GroupedGemm {
  using Tile = Shape<Int<kTileM>, Int<kTileN>, Int<64>>;
  using Cluster = Shape<Int<1>, Int<1>, Int<1>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor *, 8, Output,
      RowMajor *, 16 / sizeof(Output),
      cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor *, 8, Element,
      LayoutB *, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;
  using Shapes = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shapes, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // Strides and shapes are written as the numbers that vary in them.
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;
  static_assert(sizeof(StrideA) == 8 && sizeof(StrideB) == 8 && sizeof(StrideD) == 8);
  static_assert(sizeof(Shape<int, int, int>) == 12);

  static typename Gemm::Arguments arguments(const Problems &problems, int multiprocessors) {
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {problems.count, reinterpret_cast<Shape<int, int, int> *>(problems.shape),
                          nullptr};
    args.mainloop.ptr_A = reinterpret_cast<const Element **>(problems.a);
    args.mainloop.dA = reinterpret_cast<StrideA *>(problems.lda);
    args.mainloop.ptr_B = reinterpret_cast<const Element **>(problems.b);
    args.mainloop.dB = reinterpret_cast<StrideB *>(problems.ldb);
    args.epilogue.ptr_C = nullptr;
    args.epilogue.dC = nullptr;
    args.epilogue.ptr_D = reinterpret_cast<Output **>(problems.d);
    args.epilogue.dD = reinterpret_cast<StrideD *>(problems.ldd);
    args.epilogue.thread.alpha = 1;
    args.epilogue.thread.beta = 0;
    args.hw_info.sm_count = multiprocessors;
    return args;
  }

  static int64_t workspace(int multiprocessors) {
    return Gemm::get_workspace_size(arguments({}, multiprocessors));
  }

  static void launch(const Problems &problems, int multiprocessors, void *workspace,
                     cudaStream_t stream) {
    Gemm gemm;
    auto status = gemm.run(arguments(problems, multiprocessors), workspace, stream);
    if (status == cutlass::Status::kSuccess) return;
    throw std::runtime_error(std::string("a grouped GEMM: ") + cutlassGetStatusString(status));
  }
};

// A logits' tile is a block. Tiles of the output have 64 queries, so that few rows use more of the
// multiprocessors.
template <class Element>
using Logits = GroupedGemm<Element, float, ColumnMajor, 128, 128>;
template <class Element, int kDim>
using Out = GroupedGemm<Element, Element, RowMajor, 64, kDim>;

template <class Element>
void launch(const GroupedGemmArgs &args, int multiprocessors, cudaStream_t stream) {
  prepare<Element><<<args.num_blocks + args.num_rows, kPrepareThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of prepare");
  Logits<Element>::launch(args.of_logits, multiprocessors, args.workspace, stream);
  dim3 queries(args.num_rows * args.block_q, args.heads);
  softmax<Element><<<queries, kSoftmaxThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of softmax");
  if (args.head_dim <= 64) {
    Out<Element, 64>::launch(args.of_out, multiprocessors, args.workspace, stream);
  } else {
    Out<Element, 128>::launch(args.of_out, multiprocessors, args.workspace, stream);
  }
}

}  // namespace

int64_t grouped_gemm_workspace(int32_t multiprocessors) {
  using Half = cutlass::half_t;
  return std::max({Logits<Half>::workspace(multiprocessors),
                   Out<Half, 64>::workspace(multiprocessors),
                   Out<Half, 128>::workspace(multiprocessors)});
}

void grouped_gemm(const GroupedGemmArgs &args, cudaStream_t stream) {
  int device, multiprocessors;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  int64_t needed = grouped_gemm_workspace(multiprocessors);
  if (args.workspace_bytes < needed) {
    throw std::runtime_error("workspace has " + std::to_string(args.workspace_bytes) +
                             " bytes; expected at least " + std::to_string(needed));
  }
  if (args.dtype == JSPARSE_FLOAT16) {
    launch<cutlass::half_t>(args, multiprocessors, stream);
  } else {
    launch<cutlass::bfloat16_t>(args, multiprocessors, stream);
  }
}

}  // namespace jsparse
