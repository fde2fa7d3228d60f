// SPDX-License-Identifier: Apache-2.0
//
// The CUDA lines of kernels.inc, and how a kernel is found among them.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "cuda/calls.h"

namespace sparselt::cuda {

struct KernelInfo {
  std::string_view name;
  std::string_view op;
  std::string_view format;
  std::string_view isa;
  std::string_view dtype;
  SpmmLauncher spmm;      // null unless op is "spmm"
  Conv2dLauncher conv2d;  // null unless op is "conv2d"
};

// In the order of kernels.inc.
std::span<const KernelInfo> kernels();

// Empty where kernels for `isa` can run on a device; otherwise the reason why not. Asks for the
// device's properties alone: a context, which takes hundreds of megabytes there, is left to those
// who compute on it.
std::string why_unusable(std::string_view isa, int device);

// What to set to build for a device.
std::string how_to_rebuild(int device);

// The kernel called `name`, or the first usable one of the format called so, for an operation on a
// type on a device. Throws with the names that would do.
const KernelInfo& find_kernel(std::string_view name, std::string_view op, std::string_view dtype,
                              int device);

// The format of the kernel called `name`, or `name` itself where it is a format; empty for neither.
std::string_view format_of(std::string_view name);

}  // namespace sparselt::cuda
