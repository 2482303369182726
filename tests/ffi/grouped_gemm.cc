// The baseline of ffi/baseline/ on a CPU: the real handler and steps. Products are plain loops, that
// read the arrays which a grouped GEMM reads on a GPU.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "baseline/handler.cc"
#include "baseline/steps.cuh"

namespace jsparse {
namespace {

constexpr int kThreads = 5;  // more than have work in the softmax of one block

// `by_column`: b is [n, k], else [k, n].
template <class Element, class Output>
void multiply(const Problems &problems, bool by_column) {
  for (int p = 0; p < problems.count; ++p) {
    const int32_t *shape = problems.shape + 3 * p;
    auto *a = static_cast<const Element *>(problems.a[p]);
    auto *b = static_cast<const Element *>(problems.b[p]);
    auto *d = static_cast<Output *>(problems.d[p]);
    for (int i = 0; i < shape[0]; ++i) {
      for (int j = 0; j < shape[1]; ++j) {
        float sum = 0;
        for (int l = 0; l < shape[2]; ++l) {
          int64_t at = by_column ? j * problems.ldb[p] + l : l * problems.ldb[p] + j;
          sum += float(a[i * problems.lda[p] + l]) * float(b[at]);
        }
        d[i * problems.ldd[p] + j] = Output(sum);
      }
    }
  }
}

template <class Element>
void softmax(const GroupedGemmArgs &args, int query, int head) {
  int row = query / args.block_q, keys = keys_of_row(args, row);
  if (keys == 0) return;
  int64_t start = start_of_row(args, head, row) + int64_t(query % args.block_q) * keys;
  Sum sum;
  for (int t = 0; t < kThreads; ++t) {
    sum.add(sum_logits(args.logits + start, keys, args.scale_log2, {t, kThreads}));
  }
  for (int t = 0; t < kThreads; ++t) {
    write_weights(args.logits + start, static_cast<Element *>(args.weights) + start, keys,
                  args.scale_log2, sum, {t, kThreads});
  }
}

template <class Element>
void run_on_host(const GroupedGemmArgs &args) {
  for (int t = 0; t < kThreads; ++t) {
    for (int n = 0; n < args.num_blocks; ++n) prepare_block<Element>(args, n, {t, kThreads});
    for (int row = 0; row < args.num_rows; ++row) prepare_row<Element>(args, row, {t, kThreads});
  }
  multiply<Element, float>(args.of_logits, true);
  for (int query = 0; query < args.num_rows * args.block_q; ++query) {
    for (int head = 0; head < args.heads; ++head) softmax<Element>(args, query, head);
  }
  multiply<Element, Element>(args.of_out, false);
}

}  // namespace

int64_t grouped_gemm_workspace(int32_t multiprocessors) { return 128 * multiprocessors; }

void grouped_gemm(const GroupedGemmArgs &args, cudaStream_t) {
  if (args.dtype == JSPARSE_FLOAT16) return run_on_host<cutlass::half_t>(args);
  run_on_host<cutlass::bfloat16_t>(args);
}

}  // namespace jsparse

extern "C" JSPARSE_API XLA_FFI_Error *jsparse_grouped_gemm_on_host(XLA_FFI_CallFrame *call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_grouped_gemm_on_host,
    [](auto... arguments) { return jsparse::run(nullptr, arguments...); },
    jsparse::with_buffers(xla::ffi::Ffi::Bind()));
