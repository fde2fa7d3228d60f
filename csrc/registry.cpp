// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <stdexcept>

namespace sparselt {
namespace {

// Names the op once: a kernel's signature decides which of the pointers it fills.
struct KernelFunction {
  SpmmKernel spmm = nullptr;
  PanelKernel panel = nullptr;
  Conv2dKernel conv2d = nullptr;
  BandKernel band = nullptr;
  SpmvKernel spmv = nullptr;
  DepthwiseKernel depthwise = nullptr;
  KernelFunction() = default;
  explicit KernelFunction(SpmmKernel function) : spmm(function) {}
  explicit KernelFunction(PanelKernel function) : panel(function) {}
  explicit KernelFunction(Conv2dKernel function) : conv2d(function) {}
  explicit KernelFunction(BandKernel function) : band(function) {}
  explicit KernelFunction(SpmvKernel function) : spmv(function) {}
  explicit KernelFunction(DepthwiseKernel function) : depthwise(function) {}
};

KernelInfo make_info(std::string_view name, std::string_view op, std::string_view format,
                     std::string_view device, Isa isa, int tile_rows, int tile_columns,
                     std::string_view dtype, KernelFunction function) {
  return {name,          op,
          format,        device,
          isa,           tile_rows,
          tile_columns,  dtype,
          function.spmm, function.conv2d,
          function.band, function.panel,
          function.spmv, function.depthwise};
}

// A kernel for another architecture, or for CUDA, is listed here but not built into this module.
#define KERNEL_BUILT(name) KernelFunction(&cpu::name)
#define KERNEL_LISTED(name) KernelFunction()
#if defined(__x86_64__)
#define KERNEL_FUNCTION_avx2 KERNEL_BUILT
#define KERNEL_FUNCTION_avx512 KERNEL_BUILT
#else
#define KERNEL_FUNCTION_avx2 KERNEL_LISTED
#define KERNEL_FUNCTION_avx512 KERNEL_LISTED
#endif
#if defined(__aarch64__)
#define KERNEL_FUNCTION_neon KERNEL_BUILT
#else
#define KERNEL_FUNCTION_neon KERNEL_LISTED
#endif
#define KERNEL_FUNCTION_scalar KERNEL_BUILT
#define KERNEL_FUNCTION_sm80 KERNEL_LISTED
#define KERNEL(name, op, format, device, isa, tile_rows, tile_columns, dtype)        \
  make_info(#name, #op, #format, #device, Isa::isa, tile_rows, tile_columns, #dtype, \
            KERNEL_FUNCTION_##isa(name)),
const KernelInfo kTable[] = {
#include "kernels.inc"
};
#undef KERNEL
#undef KERNEL_FUNCTION_sm80
#undef KERNEL_FUNCTION_scalar
#undef KERNEL_FUNCTION_neon
#undef KERNEL_FUNCTION_avx512
#undef KERNEL_FUNCTION_avx2
#undef KERNEL_LISTED
#undef KERNEL_BUILT

}  // namespace

std::span<const KernelInfo> kernels() { return kTable; }

std::string why_unusable(const KernelInfo& kernel) {
  if (kernel.device != "cpu") return "runs on CUDA, through sparselt._C_cuda";
  return why_unsupported(kernel.isa);
}

const KernelInfo& find_kernel(std::string_view name, std::string_view op, int64_t block_rows) {
  const auto serves = [&](const KernelInfo& kernel) {
    if (kernel.device != "cpu") return false;
    const bool serves_op = kernel.op == op || kernel.panel || (kernel.spmv && op == "spmm") ||
                           (kernel.band && op == "conv2d");
    const bool walks_slices = kernel.panel || kernel.spmv;
    return serves_op && (!walks_slices || kernel.tile_rows == 1 || kernel.tile_rows == block_rows);
  };
  for (const KernelInfo& kernel : kTable) {
    if ((kernel.name != name && kernel.format != name) || !serves(kernel)) continue;
    const std::string reason = why_unusable(kernel);
    if (reason.empty()) return kernel;
    if (kernel.name == name) {
      throw std::runtime_error(std::string(name) + " cannot run here: " + reason);
    }
  }
  std::string usable;
  for (const KernelInfo& kernel : kTable) {
    if (serves(kernel) && why_unusable(kernel).empty()) {
      usable.append(usable.empty() ? "" : ", ").append(kernel.name);
    }
  }
  throw std::runtime_error("kernel: expected one for " + std::string(op) + " with blocks of " +
                           std::to_string(block_rows) + " rows, or a format of theirs (" +
                           (usable.empty() ? "none is usable here" : usable) + "), got '" +
                           std::string(name) + "'");
}

}  // namespace sparselt
