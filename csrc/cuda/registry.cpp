// SPDX-License-Identifier: Apache-2.0
#include "cuda/registry.h"

#include <stdexcept>

// What setup.py had nvcc make: machine code ("sm_80") and PTX ("compute_89"), with a space between.
// Empty where it does not know.
#ifndef SPARSELT_CUDA_CODE
#define SPARSELT_CUDA_CODE ""
#endif

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

std::string version(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// Whether one item of SPARSELT_CUDA_CODE runs on a capability. Machine code runs on its own and on
// later ones of the same major number, PTX on all later ones; what ends in "a" on its own alone,
// and what ends in "f" within its major number.
bool serves(std::string_view item, int capability) {
  const int built = std::stoi(std::string(item.substr(item.find('_') + 1)));
  if (item.back() == 'a') return capability == built;
  const bool within = item.rfind("sm_", 0) == 0 || item.back() == 'f';
  return capability >= built && (!within || capability / 10 == built / 10);
}

bool is_built_for(int capability) {
  std::string_view rest = SPARSELT_CUDA_CODE;
  if (rest.empty()) return true;
  while (true) {
    const size_t end = rest.find(' ');
    if (serves(rest.substr(0, end), capability)) return true;
    if (end == std::string_view::npos) return false;
    rest.remove_prefix(end + 1);
  }
}

}  // namespace

std::span<const KernelInfo> kernels() { return kTable; }

std::string how_to_rebuild(int device) {
  return "rebuild sparselt with TORCH_CUDA_ARCH_LIST=" + version(capability(device));
}

std::string why_unusable(std::string_view isa, int device) {
  const int needed = std::stoi(std::string(isa.substr(2)));  // "sm80"
  const int found = capability(device);
  // Code for "sm90a" runs on 9.0 alone, other code on what is newer too.
  const bool exact = isa.back() == 'a';
  const bool suits = exact ? found == needed : found >= needed;
  if (suits && is_built_for(found)) return "";
  if (found == 0) return "there is no CUDA device " + std::to_string(device);
  const std::string place = "device " + std::to_string(device) + " has " + version(found);
  if (!suits) {
    return "it needs compute capability " + version(needed) + (exact ? " exactly" : "") + ", " +
           place + "; run the layer on the CPU or keep it dense";
  }
  return "this build has code for " SPARSELT_CUDA_CODE " alone, " + place + "; " +
         how_to_rebuild(device);
}

std::string_view format_of(std::string_view name) {
  for (const KernelInfo& kernel : kTable) {
    if (kernel.name == name || kernel.format == name) return kernel.format;
  }
  return {};
}

const KernelInfo& find_kernel(std::string_view name, std::string_view op, std::string_view dtype,
                              int device) {
  std::string names;
  std::string refusal;
  for (const KernelInfo& kernel : kTable) {
    if (kernel.op != op || kernel.dtype != dtype) continue;
    names.append(names.empty() ? "" : ", ").append(kernel.name);
    if (kernel.name != name && kernel.format != name) continue;
    const std::string reason = why_unusable(kernel.isa, device);
    if (reason.empty()) return kernel;
    refusal = std::string(kernel.name) + " cannot run here: " + reason;
  }
  if (!refusal.empty()) throw std::runtime_error(refusal);
  throw std::runtime_error("kernel: expected a CUDA kernel for " + std::string(op) + " in " +
                           std::string(dtype) + ", or a format of theirs (" + names + "), got '" +
                           std::string(name) + "'");
}

}  // namespace sparselt::cuda
