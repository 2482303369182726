// Which kernel takes which head size. Host and device read it.
#pragma once

namespace jsparse {

// The head size of the kernel for arrays of `head_dim`, or 0 if there is none. What a kernel's tiles have
// more than the arrays TMA fills with zeros, and no kernel stores.
constexpr int kernel_head_dim(int head_dim) {
  if (head_dim < 8 || head_dim > 128 || head_dim % 8 != 0) return 0;
  return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128;
}

}  // namespace jsparse
