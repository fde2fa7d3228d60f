// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "jit/panel_code.h"
#include "registry.h"

namespace sparselt {

// A kernel, and the weight as it sees it. Points into arrays that its maker keeps alive.
struct Weight {
  const KernelInfo* kernel;
  int64_t rows;
  int64_t cols;
  SparseView view;                             // of csr and bsr
  SellView sell;                               // of the sliced formats
  BitsView bits;                               // of bits; all null of others
  WindowView window;                           // of window; all null of others
  std::shared_ptr<const jit::PanelCode> code;  // what sell.code points into
};

}  // namespace sparselt
