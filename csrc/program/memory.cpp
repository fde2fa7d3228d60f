// SPDX-License-Identifier: Apache-2.0
#include "program/memory.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <numeric>
#include <utility>

#include "huge_pages.h"
#include "ops/task.h"

namespace sparselt {
namespace {

constexpr size_t kPage = 4096;

bool overlap(const Block& a, const Block& b) { return a.first <= b.last && b.first <= a.last; }

}  // namespace

MemoryPlan plan_memory(const std::vector<Block>& blocks) {
  std::vector<size_t> order(blocks.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return blocks[a].floats > blocks[b].floats; });
  MemoryPlan plan{std::vector<int64_t>(blocks.size(), 0), 0};
  std::vector<size_t> placed;
  for (const size_t index : order) {
    const int64_t floats = whole_lines(blocks[index].floats);
    std::vector<std::pair<int64_t, int64_t>> taken;  // begin and end of what is in the way
    for (const size_t other : placed) {
      if (!overlap(blocks[index], blocks[other])) continue;
      const int64_t begin = plan.offsets[other];
      taken.emplace_back(begin, begin + whole_lines(blocks[other].floats));
    }
    std::sort(taken.begin(), taken.end());
    int64_t best = -1;
    int64_t best_gap = std::numeric_limits<int64_t>::max();
    int64_t end = 0;
    for (const auto& [taken_begin, taken_end] : taken) {
      const int64_t gap = taken_begin - end;
      if (gap >= floats && gap < best_gap) {
        best = end;
        best_gap = gap;
      }
      end = std::max(end, taken_end);
    }
    plan.offsets[index] = best >= 0 ? best : end;
    plan.floats = std::max(plan.floats, plan.offsets[index] + floats);
    placed.push_back(index);
  }
  return plan;
}

Arena::Arena(int64_t floats) : floats_(floats) {
  const size_t bytes = sizeof(float) * static_cast<size_t>(std::max<int64_t>(floats, 1));
  const size_t alignment = bytes >= kHugePage ? kHugePage : kPage;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<float*>(std::aligned_alloc(alignment, rounded)));
  if (!data_) throw std::bad_alloc();
  advise_huge_pages(data_.get(), rounded);
}

void Arena::Free::operator()(float* data) const { std::free(data); }

std::unique_ptr<Arena> ArenaPool::take(int64_t floats) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Arena> arena;
  if (!free_.empty()) {
    arena = std::move(free_.back());
    free_.pop_back();
  }
  if (!arena || arena->floats() < floats) {
    arena = nullptr;  // freed first: the two need never exist at once
    arena = std::make_unique<Arena>(floats);
    ++allocations_;
  }
  return arena;
}

void ArenaPool::give_back(std::unique_ptr<Arena> arena) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(arena));
}

int64_t ArenaPool::allocations() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return allocations_;
}

}  // namespace sparselt
