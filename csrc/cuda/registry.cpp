// SPDX-License-Identifier: Apache-2.0
#include "cuda/registry.h"

#include <stdexcept>

namespace sparselt::cuda {
namespace {

struct Launcher {
  SpmmLauncher spmm = nullptr;
  Conv2dLauncher conv2d = nullptr;
  explicit Launcher(SpmmLauncher function) : spmm(function) {}
  explicit Launcher(Conv2dLauncher function) : conv2d(function) {}
};

KernelInfo make_info(std::string_view name, std::string_view op, std::string_view format,
                     std::string_view isa, std::string_view dtype, Launcher launcher) {
  return {name, op, format, isa, dtype, launcher.spmm, launcher.conv2d};
}

#define KERNEL_INFO_cpu(name, op, format, isa, dtype)
#define KERNEL_INFO_cuda(name, op, format, isa, dtype) \
  make_info(#name, #op, #format, #isa, #dtype, Launcher(&name)),
#define KERNEL(name, op, format, device, isa, tile_rows, tile_columns, dtype) \
  KERNEL_INFO_##device(name, op, format, isa, dtype)
const KernelInfo kTable[] = {
#include "kernels.inc"
};
#undef KERNEL
#undef KERNEL_INFO_cuda
#undef KERNEL_INFO_cpu

// The compute capability, 80 for 8.0; 0 where there is no such device.
int capability(int device) {
  int major = 0;
  int minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    return 10 * major + minor;
  cudaGetLastError();  // or the next launch of anybody would report it
  return 0;
}

bool fits(const KernelInfo& kernel, std::string_view op, std::string_view format,
          std::string_view dtype) {
  return kernel.op == op && kernel.format == format && kernel.dtype == dtype;
}

}  // namespace

std::span<const KernelInfo> kernels() { return kTable; }

std::string why_unusable(std::string_view isa, int device) {
  const int needed = std::stoi(std::string(isa.substr(2)));  // "sm80"
  const int found = capability(device);
  // Code for "sm90a" runs on 9.0 alone, other code on what is newer too.
  const bool exact = isa.back() == 'a';
  if (exact ? found == needed : found >= needed) return "";
  if (found == 0) return "there is no CUDA device " + std::to_string(device);
  const auto version = [](int value) {
    return std::to_string(value / 10) + "." + std::to_string(value % 10);
  };
  return "it needs compute capability " + version(needed) + (exact ? " exactly" : "") +
         ", device " + std::to_string(device) + " has " + version(found) +
         "; run the layer on the CPU or keep it dense";
}

const KernelInfo& find_kernel(std::string_view name, std::string_view op, std::string_view format,
                              std::string_view dtype, int device) {
  std::string names;
  std::string refusal;
  for (const KernelInfo& kernel : kTable) {
    if (!fits(kernel, op, format, dtype)) continue;
    names.append(names.empty() ? "" : ", ").append(kernel.name);
    if (!name.empty() && kernel.name != name) continue;
    const std::string reason = why_unusable(kernel.isa, device);
    if (reason.empty()) return kernel;
    refusal = std::string(kernel.name) + " cannot run here: " + reason;
  }
  if (!refusal.empty()) throw std::runtime_error(refusal);
  throw std::runtime_error("kernel: expected a CUDA kernel for " + std::string(op) + " on format " +
                           std::string(format) + " in " + std::string(dtype) + " (" +
                           (names.empty() ? "there is none" : names) + "), got '" +
                           std::string(name) + "'");
}

}  // namespace sparselt::cuda
