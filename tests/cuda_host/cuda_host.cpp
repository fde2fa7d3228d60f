// SPDX-License-Identifier: Apache-2.0
#include "cuda_host.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"

namespace cuda_host {
namespace {

// A page below each stack that nobody may touch tells when it is too small.
constexpr size_t kStackBytes = 32 * 1024;
constexpr size_t kPageBytes = 64 * 1024;
constexpr size_t kSlotBytes = 64;
constexpr unsigned char kPoison = 0xff;  // as floats of any width: NaN
constexpr size_t kGuardBytes = 256;  // on each side of shared memory, where no sanitizer watches
constexpr unsigned char kGuard = 0xa5;

enum class State { kReady, kAtBarrier, kAtStep, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

struct Fiber {
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::kDone;
  Step step{};
  unsigned steps = 0;        // taken so far: which of the warp's two sets of slots is next
  std::vector<Copy> issued;  // not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived = 0;
  unsigned char slots[2][kWarp * kSlotBytes];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char*> shared_pages;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int at_barrier = 0;
  unsigned index = 0;
  int current = -1;
  const std::function<void()>* body = nullptr;
};

Block block;
Context scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
unsigned schedule = 0;

Fiber& self() { return block.fibers[static_cast<size_t>(block.current)]; }

void yield_as(State state) {
  Fiber& fiber = self();
  fiber.state = state;
  before_switch(state == State::kDone ? nullptr : &fiber.fake_stack, scheduler_stack,
                scheduler_stack_bytes);
  switch_context(fiber.context, scheduler);
  after_switch(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void enter() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*block.body)();
  if (!self().issued.empty()) fail("a thread ended with background copies that it never committed");
  for (const auto& group : self().groups) {
    if (!group.empty()) fail("a thread ended with background copies that it never waited for");
  }
  yield_as(State::kDone);
}

void resume(int thread) {
  block.current = thread;
  Fiber& fiber = self();
  before_switch(&scheduler_fake_stack, fiber.stack, kStackBytes);
  switch_context(scheduler, fiber.context);
  after_switch(scheduler_fake_stack, nullptr, nullptr);
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* pages =
        mmap(nullptr, kPageBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) fail("no memory for a thread's stack");
    fiber.stack = static_cast<unsigned char*>(pages) + kPageBytes;
    if (mprotect(fiber.stack, kStackBytes, PROT_READ | PROT_WRITE) != 0)
      fail("no memory for a thread's stack");
  }
  forget_stack(fiber.stack, kStackBytes);
  make_context(fiber.context, fiber.stack, kStackBytes, enter);
  fiber.state = State::kReady;
  fiber.steps = 0;
  fiber.issued.clear();
  fiber.groups.clear();
}

void run_block(const std::vector<int>& order) {
  for (Fiber& fiber : block.fibers) prepare(fiber);
  for (Warp& warp : block.warps) warp.arrived = 0;
  block.at_barrier = 0;
  for (bool progress = true; progress;) {
    progress = false;
    for (const int thread : order) {
      if (block.fibers[static_cast<size_t>(thread)].state != State::kReady) continue;
      resume(thread);
      progress = true;
    }
  }
  block.current = -1;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state != State::kDone) fail("threads wait for others that do not come");
  }
}

}  // namespace

uint3 thread_index() { return {static_cast<unsigned>(block.current), 0, 0}; }
uint3 block_index() { return {block.index, 0, 0}; }
unsigned char* shared_memory() { return block.shared; }
void set_schedule(unsigned wanted) { schedule = wanted; }

void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: block %u: %s\n", block.index, what);
  if (block.current >= 0) std::fprintf(stderr, "  noticed in thread %d\n", block.current);
  const char* names[] = {"ready", "at a barrier", "at a warp step", "done"};
  for (size_t i = 0, first = 0; i < block.fibers.size(); ++i) {
    const bool last =
        i + 1 == block.fibers.size() || block.fibers[i + 1].state != block.fibers[i].state;
    if (!last) continue;
    std::fprintf(stderr, "  threads %zu to %zu: %s\n", first, i,
                 names[static_cast<int>(block.fibers[i].state)]);
    first = i + 1;
  }
  std::fflush(stderr);
  std::_Exit(3);
}

cudaError_t run(int64_t blocks, int threads, size_t shared_bytes,
                const std::function<void()>& body) {
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0 || blocks > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedLimit) return cudaErrorNotSupported;
  for (size_t i = static_cast<size_t>(threads); i < block.fibers.size(); ++i) {
    if (block.fibers[i].stack == nullptr) continue;
    munmap(static_cast<unsigned char*>(block.fibers[i].stack) - kPageBytes,
           kPageBytes + kStackBytes);
  }
  block.fibers.resize(static_cast<size_t>(threads));
  block.warps.resize(static_cast<size_t>(threads / kWarp));
  block.body = &body;
#if defined(__SANITIZE_ADDRESS__)
  const size_t guard = 0;
#else
  const size_t guard = kGuardBytes;
#endif
  std::vector<int> order(static_cast<size_t>(threads));
  std::iota(order.begin(), order.end(), 0);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), std::mt19937(schedule));
  for (int64_t i = 0; i < blocks; ++i) {
    void* allocation = nullptr;
    if (posix_memalign(&allocation, 1024, guard * 4 + shared_bytes + guard) != 0)
      fail("no memory for shared memory");
    unsigned char* base = static_cast<unsigned char*>(allocation);
    std::memset(base, kGuard, guard * 4 + shared_bytes + guard);
    block.shared = base + guard * 4;
    block.shared_bytes = shared_bytes;
    std::memset(block.shared, kPoison, shared_bytes);
    block.index = static_cast<unsigned>(i);
    run_block(order);
    for (size_t j = 0; j < guard; ++j) {
      if (base[3 * guard + j] != kGuard || block.shared[shared_bytes + j] != kGuard)
        fail("wrote outside shared memory");
    }
    std::free(allocation);
  }
  return cudaSuccess;
}

void barrier() {
  if (++block.at_barrier < static_cast<int>(block.fibers.size()))
    return yield_as(State::kAtBarrier);
  block.at_barrier = 0;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
}

const unsigned char* exchange(Step step, const void* mine, size_t bytes) {
  Fiber& fiber = self();
  const int lane = block.current % kWarp;
  const size_t first = static_cast<size_t>(block.current - lane);
  Warp& warp = block.warps[first / kWarp];
  unsigned char* slots = warp.slots[fiber.steps++ % 2];
  if (bytes > kSlotBytes) fail("a warp step with too much data");
  if (bytes > 0) std::memcpy(slots + static_cast<size_t>(lane) * kSlotBytes, mine, bytes);
  fiber.step = step;
  if (++warp.arrived < kWarp) {
    yield_as(State::kAtStep);
    return slots;
  }
  warp.arrived = 0;
  for (size_t i = first; i < first + kWarp; ++i) {
    if (block.fibers[i].step != step) fail("threads of a warp meet in different steps");
    if (block.fibers[i].state == State::kAtStep) block.fibers[i].state = State::kReady;
  }
  return slots;
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  const auto* to = static_cast<unsigned char*>(shared);
  if (to < block.shared || to + bytes > block.shared + block.shared_bytes)
    fail("a background copy outside shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0)
    fail("a background copy to an unaligned address");
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("a background copy from an unaligned address");
  std::memset(shared, kPoison, bytes);
  self().issued.push_back({shared, global, bytes, valid});
}

void copy_commit() {
  Fiber& fiber = self();
  fiber.groups.push_back(std::move(fiber.issued));
  fiber.issued.clear();
}

void copy_wait(int pending) {
  Fiber& fiber = self();
  while (fiber.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}

}  // namespace cuda_host
