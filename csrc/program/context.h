// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "program/program.h"

namespace sparselt {

// What a run has to itself. Reused from run to run.
struct Program::Context {
  std::unique_ptr<Arena> arena;
  std::vector<float*> places;                       // of values that are roots
  std::vector<std::optional<Tensor>> results;       // of torch, by value
  std::unique_ptr<std::atomic<uint32_t>[]> claims;  // a part each: the last region that claimed it
  uint32_t region = 0;
  alignas(64) std::atomic<int64_t> done{0};  // parts of the running region
};

}  // namespace sparselt
