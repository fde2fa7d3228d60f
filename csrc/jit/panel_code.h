// SPDX-License-Identifier: Apache-2.0
//
// Straight-line code for the pattern of a SELL weight: what the loops of a panel kernel do, with
// every column and row written into the instructions. Values stay where they are and are read at
// each run. Knows no torch.
#pragma once

#include <vector>

#include "jit/executable_memory.h"
#include "kernels.h"

namespace sparselt::jit {

// Slices of more rows than registers can hold sums of have no code.
constexpr int kMaxCodeRows = 31;

class PanelCode {
 public:
  // Without executable memory, or for slices that are too high, view() is empty.
  explicit PanelCode(const SellView& weight);

  CodeView view() const;
  size_t bytes() const { return memory_.size(); }
  const uint8_t* data() const { return memory_.data(); }

 private:
  ExecutableMemory memory_;
  std::vector<CodeChunk> chunks_;
  std::vector<int32_t> block_chunks_;
  std::vector<float> zeros_;
};

}  // namespace sparselt::jit
