// The XLA FFI handler of the baseline: checks buffers and attributes, and launches.
//
// Operands: q k v, row_start, rows, columns. Results: out, and scratch: logits, weights, gathered,
// the shapes and addresses of the problems of each GEMM, workspace. grouped_gemm.h has the shapes.
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "baseline/grouped_gemm.h"
#include "buffers.h"

namespace jsparse {
namespace {

// The data of a buffer of 16-bit floats that has the shape.
void *half(const std::string &name, AnyBuffer x, DataType dtype,
           const std::vector<int64_t> &shape) {
  if (dtype == DataType::F16) return data<DataType::F16>(name, x, shape);
  return data<DataType::BF16>(name, x, shape);
}

Problems problems(const std::string &of, AnyBuffer shapes, AnyBuffer addresses, int64_t count) {
  if (count > std::numeric_limits<int32_t>::max()) {
    throw Refusal(std::to_string(count) + " problems of " + of + "; expected at most 2147483647");
  }
  return problems_in(data<DataType::S32>("shapes of " + of, shapes, {count, 3}),
                     data<DataType::S32>("addresses of " + of, addresses,
                                         {kAddressArrays, count, 2}),
                     int32_t(count));
}

// Sizes of a call, read off q, rows and the attributes.
GroupedGemmArgs sizes_of(AnyBuffer q, AnyBuffer rows, int32_t block_q, int32_t block_kv,
                         float scale) {
  for (int32_t block : {block_q, block_kv}) {
    if (block == 64 || block == 128) continue;
    throw Refusal("a block of " + std::to_string(block) + "; expected 64 or 128");
  }
  auto of_q = q.dimensions();
  if (of_q.size() != 3 || of_q[0] < 1 || of_q[0] % block_q != 0 || of_q[0] > 1 << 30 ||
      of_q[1] < 1 || of_q[1] > 65535 || of_q[2] < 8 || of_q[2] % 8 != 0 || of_q[2] > 128) {
    throw Refusal("q has shape " + list(of_q) +
                  "; expected whole blocks of tokens, heads, and a multiple of 8 up to 128");
  }
  if (rows.dimensions().size() != 1 || rows.dimensions()[0] < 1 ||
      rows.dimensions()[0] > 1 << 30) {
    throw Refusal("rows has shape " + list(rows.dimensions()) + "; expected one of each block");
  }
  GroupedGemmArgs args = {};
  args.dtype = q.element_type() == DataType::F16 ? JSPARSE_FLOAT16 : JSPARSE_BFLOAT16;
  args.block_q = block_q;
  args.block_kv = block_kv;
  args.num_rows = int32_t(of_q[0] / block_q);
  args.num_blocks = int32_t(rows.dimensions()[0]);
  args.heads = int32_t(of_q[1]);
  args.head_dim = int32_t(of_q[2]);
  args.scale_log2 = scale * 1.4426950408889634f;
  return args;
}

ffi::Error run(cudaStream_t stream, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer row_start,
               AnyBuffer rows, AnyBuffer columns, ffi::Result<AnyBuffer> out,
               ffi::Result<AnyBuffer> logits, ffi::Result<AnyBuffer> weights,
               ffi::Result<AnyBuffer> gathered, ffi::Result<AnyBuffer> logits_shapes,
               ffi::Result<AnyBuffer> logits_addresses, ffi::Result<AnyBuffer> out_shapes,
               ffi::Result<AnyBuffer> out_addresses, ffi::Result<AnyBuffer> workspace,
               int32_t block_q, int32_t block_kv, float scale) {
  try {
    GroupedGemmArgs args = sizes_of(q, rows, block_q, block_kv, scale);
    DataType dtype = q.element_type();
    int64_t heads = args.heads, dim = args.head_dim, blocks = args.num_blocks;
    std::vector<int64_t> of_q = {args.num_rows * int64_t(block_q), heads, dim};
    int64_t elements = blocks * block_q * block_kv;

    args.q = half("q", q, dtype, of_q);
    args.k = half("k", k, dtype, {kAny, heads, dim});
    int64_t keys = k.dimensions()[0];
    if (keys < 1 || keys % block_kv != 0) {
      throw Refusal("k has shape " + list(k.dimensions()) + "; expected whole blocks of tokens");
    }
    args.v = half("v", v, dtype, {keys, heads, dim});
    args.row_start = data<DataType::S32>("row_start", row_start, {args.num_rows + 1});
    args.rows = data<DataType::S32>("rows", rows, {blocks});
    args.columns = data<DataType::S32>("columns", columns, {blocks});

    args.out = half("out", *out, dtype, of_q);
    args.logits = data<DataType::F32>("logits", *logits, {heads, elements});
    args.weights = half("weights", *weights, dtype, {heads, elements});
    args.gathered = half("gathered", *gathered, dtype, {blocks * block_kv, heads, dim});
    args.of_logits = problems("logits", *logits_shapes, *logits_addresses, heads * blocks);
    args.of_out = problems("out", *out_shapes, *out_addresses, heads * args.num_rows);
    args.workspace = data<DataType::U8>("workspace", *workspace, {kAny});
    args.workspace_bytes = workspace->dimensions()[0];
    grouped_gemm(args, stream);
    return ffi::Error::Success();
  } catch (const Refusal &refusal) {
    return ffi::Error::InvalidArgument(std::string("jsparse_grouped_gemm: ") + refusal.what());
  } catch (const std::runtime_error &failure) {
    return ffi::Error::Internal(std::string("jsparse_grouped_gemm: ") + failure.what());
  }
}

// What follows the context in a binding: the parameters of `run` after the stream.
template <class Binding>
auto with_buffers(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // row_start
      .template Arg<AnyBuffer>()  // rows
      .template Arg<AnyBuffer>()  // columns
      .template Ret<AnyBuffer>()  // out
      .template Ret<AnyBuffer>()  // logits
      .template Ret<AnyBuffer>()  // weights
      .template Ret<AnyBuffer>()  // gathered
      .template Ret<AnyBuffer>()  // logits_shapes
      .template Ret<AnyBuffer>()  // logits_addresses
      .template Ret<AnyBuffer>()  // out_shapes
      .template Ret<AnyBuffer>()  // out_addresses
      .template Ret<AnyBuffer>()  // workspace
      .template Attr<int32_t>("block_q")
      .template Attr<int32_t>("block_kv")
      .template Attr<float>("scale");
}

}  // namespace
}  // namespace jsparse

extern "C" JSPARSE_API int64_t jsparse_grouped_gemm_workspace(int32_t multiprocessors) {
  return jsparse::grouped_gemm_workspace(multiprocessors);
}

extern "C" JSPARSE_API XLA_FFI_Error *jsparse_grouped_gemm_ffi(XLA_FFI_CallFrame *call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jsparse_grouped_gemm_ffi, jsparse::run,
    jsparse::with_buffers(xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
