// SPDX-License-Identifier: Apache-2.0
//
// Runs every CPU kernel of this architecture, or those named by its arguments, without torch, so
// that a cross compiler and an emulator are enough. Prints a line a kernel: its name and how many
// problems it solved, or why it did not run. Ends with 1 at the first wrong result, with what went
// wrong on standard error.
#include <algorithm>
#include <cstdio>

#include "problems.h"

namespace {

int64_t check(const sparselt::KernelInfo& kernel) {
  using namespace neon_test;
  if (kernel.spmv) return check_spmv(kernel);
  if (kernel.panel) return check_panel_spmm(kernel) + check_panel_conv2d(kernel);
  return kernel.op == "conv2d" ? check_conv2d(kernel) : check_spmm(kernel);
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> chosen(arguments + 1, arguments + count);
  for (const sparselt::KernelInfo& kernel : sparselt::kernels()) {
    if (kernel.device != "cpu") continue;
    const std::string name(kernel.name);
    if (!chosen.empty() && std::find(chosen.begin(), chosen.end(), name) == chosen.end()) continue;
    const bool has_table = !kernel.depthwise && kernel.op != "band" && kernel.format != "window";
    const std::string missing = has_table ? ""
                                          : "no table of problems for " + std::string(kernel.op) +
                                                " of " + std::string(kernel.format);
    const std::string unusable = sparselt::why_unusable(kernel);
    const std::string reason = unusable.empty() ? missing : unusable;
    if (reason.empty()) {
      std::printf("%s: %lld problems\n", name.c_str(), static_cast<long long>(check(kernel)));
    } else {
      std::printf("%s: not run, %s\n", name.c_str(), reason.c_str());
    }
    std::fflush(stdout);
  }
}
