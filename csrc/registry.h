// SPDX-License-Identifier: Apache-2.0
//
// The kernel table made from kernels.inc, and how one is found in it.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "cpu_features.h"
#include "kernels.h"

namespace sparselt {

struct KernelInfo {
  std::string_view name;
  std::string_view op;
  std::string_view format;
  std::string_view device;
  Isa isa;
  int tile_rows;
  int tile_columns;
  std::string_view dtype;
  SpmmKernel spmm;            // null unless op is "spmm" and device is "cpu"
  Conv2dKernel conv2d;        // null unless op is "conv2d" and device is "cpu"
  BandKernel band;            // null unless op is "band" (serves conv2d) and device is "cpu"
  PanelKernel panel;          // null unless op is "panel" or "code" and device is "cpu"
  SpmvKernel spmv;            // null unless op is "spmv" (serves spmm) and device is "cpu"
  DepthwiseKernel depthwise;  // null unless op is "depthwise" and device is "cpu"
};

// In the order of kernels.inc.
std::span<const KernelInfo> kernels();

// Empty where the kernel can run here; otherwise the reason why not.
std::string why_unusable(const KernelInfo& kernel);

// The kernel called `name`, or the first usable one of the format called so, for an operation on
// the CPU with blocks or slices of `block_rows` rows. Throws with the names that would do.
const KernelInfo& find_kernel(std::string_view name, std::string_view op, int64_t block_rows);

}  // namespace sparselt
