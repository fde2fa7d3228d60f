// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <stdexcept>

namespace sparselt {
namespace {

// Names the op once: a kernel's signature decides which of the two pointers it fills.
struct KernelFunction {
  SpmmKernel spmm = nullptr;
  Conv2dKernel conv2d = nullptr;
  KernelFunction() = default;
  explicit KernelFunction(SpmmKernel function) : spmm(function) {}
  explicit KernelFunction(Conv2dKernel function) : conv2d(function) {}
};

KernelInfo make_info(std::string_view name, std::string_view op, std::string_view format,
                     std::string_view device, Isa isa, int tile_rows, int tile_columns,
                     std::string_view dtype, KernelFunction function) {
  return {name,      op,           format, device,        isa,
          tile_rows, tile_columns, dtype,  function.spmm, function.conv2d};
}

#define KERNEL_FUNCTION_cpu(name) KernelFunction(&cpu::name)
#define KERNEL_FUNCTION_cuda(name) KernelFunction()
#define KERNEL(name, op, format, device, isa, tile_rows, tile_columns, dtype)        \
  make_info(#name, #op, #format, #device, Isa::isa, tile_rows, tile_columns, #dtype, \
            KERNEL_FUNCTION_##device(name)),
const KernelInfo kTable[] = {
#include "kernels.inc"
};
#undef KERNEL
#undef KERNEL_FUNCTION_cuda
#undef KERNEL_FUNCTION_cpu

}  // namespace

std::span<const KernelInfo> kernels() { return kTable; }

std::string why_unusable(const KernelInfo& kernel) {
  if (kernel.device != "cpu") return "runs on CUDA, through sparselt._C_cuda";
  return why_unsupported(kernel.isa);
}

const KernelInfo& find_kernel(std::string_view name, std::string_view op, std::string_view format) {
  std::string usable;
  for (const KernelInfo& kernel : kTable) {
    if (kernel.op != op || kernel.format != format || kernel.device != "cpu") continue;
    if (!name.empty() && kernel.name != name) continue;
    const std::string reason = why_unusable(kernel);
    if (reason.empty()) return kernel;
    if (!name.empty()) throw std::runtime_error(std::string(name) + " cannot run here: " + reason);
  }
  for (const KernelInfo& kernel : kTable) {
    if (kernel.op == op && kernel.format == format && why_unusable(kernel).empty()) {
      usable.append(usable.empty() ? "" : ", ").append(kernel.name);
    }
  }
  throw std::runtime_error(
      "kernel: expected one for " + std::string(op) + " on format " + std::string(format) + " (" +
      (usable.empty() ? "none is usable here" : usable) + "), got '" + std::string(name) + "'");
}

}  // namespace sparselt
