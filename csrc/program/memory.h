// SPDX-License-Identifier: Apache-2.0
//
// Where the values of a program lie in its arena: two values share memory where they are never
// needed at the same time.
#pragma once

#include <stdint.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace sparselt {

// Floats that are needed from step `first` to step `last`, both included.
struct Block {
  int64_t floats;
  int64_t first;
  int64_t last;
};

// Offsets in floats, one a block, each at the begin of a cache line.
struct MemoryPlan {
  std::vector<int64_t> offsets;
  int64_t floats;  // of the whole arena
};

// Greedy: the largest block first, each in the tightest gap between the blocks placed before that
// are needed at the same time.
MemoryPlan plan_memory(const std::vector<Block>& blocks);

// A stretch of memory aligned to a page, or to a huge page where it is large.
class Arena {
 public:
  explicit Arena(int64_t floats);
  float* data() const { return data_.get(); }
  int64_t floats() const { return floats_; }

 private:
  struct Free {
    void operator()(float* data) const;
  };
  int64_t floats_;
  std::unique_ptr<float, Free> data_;
};

// Arenas that no run is using. Shared by the programs of one network, so that it holds as many as
// runs have overlapped, each as large as the largest program needs.
class ArenaPool {
 public:
  std::unique_ptr<Arena> take(int64_t floats);
  void give_back(std::unique_ptr<Arena> arena);
  int64_t allocations() const;  // since the pool was made

 private:
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> free_;
  int64_t allocations_ = 0;
};

}  // namespace sparselt
