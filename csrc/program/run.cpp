// SPDX-License-Identifier: Apache-2.0
//
// How a program runs; see program.h.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "huge_pages.h"
#include "ops/check.h"
#include "program/context.h"

namespace sparselt {
namespace {

// Looks at the counter so often before the core is offered to somebody else.
constexpr int kPatience = 1 << 12;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_until(const std::atomic<int64_t>& done, int64_t count) {
  for (int looks = 0; done.load(std::memory_order_acquire) < count; ++looks) {
    if (looks < kPatience) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

// A context for as long as a run lasts.
class Program::Loan {
 public:
  explicit Loan(const Program& program) : program_(program) {
    {
      const std::lock_guard<std::mutex> lock(program.mutex_);
      if (!program.contexts_.empty()) {
        context_ = std::move(program.contexts_.back());
        program.contexts_.pop_back();
      }
    }
    if (!context_) context_ = program.new_context();
    context_->arena = program.pool_->take(program.arena_floats_);
  }
  ~Loan() {
    program_.pool_->give_back(std::move(context_->arena));
    const std::lock_guard<std::mutex> lock(program_.mutex_);
    program_.contexts_.push_back(std::move(context_));
  }
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
  Context& operator*() const { return *context_; }

 private:
  const Program& program_;
  std::unique_ptr<Context> context_;
};

std::unique_ptr<Program::Context> Program::new_context() const {
  auto context = std::make_unique<Context>();
  context->places.resize(values_.size());
  context->results.resize(values_.size());
  int64_t most = 0;
  for (const Region& region : regions_) {
    // Watched, stages of one part each are units of their own.
    most = std::max(most, region.parts + static_cast<int64_t>(region.stages.size()));
  }
  context->claims = std::make_unique<std::atomic<uint32_t>[]>(static_cast<size_t>(most));
  return context;
}

void Program::bind(Context& context, const std::vector<const float*>& inputs,
                   const std::vector<float*>& outputs) const {
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == num_inputs_ &&
                      static_cast<int64_t>(outputs.size()) == num_outputs_,
                  "program: expected ", num_inputs_, " inputs and ", num_outputs_, " outputs, got ",
                  inputs.size(), " and ", outputs.size());
  for (size_t i = 0; i < values_.size(); ++i) {
    const Value& value = values_[i];
    const auto index = static_cast<size_t>(value.index);
    // Tasks only read inputs and constants; one type of pointer serves all places.
    if (value.place == Place::kInput) context.places[i] = const_cast<float*>(inputs[index]);
    if (value.place == Place::kConstant) context.places[i] = const_cast<float*>(value.data);
    if (value.place == Place::kOutput) {
      context.places[i] = outputs[index];
      advise_huge_pages(outputs[index], sizeof(float) * static_cast<size_t>(value.floats));
    }
    if (value.place == Place::kArena) context.places[i] = context.arena->data() + value.offset;
  }
}

float* Program::place_of(const Context& context, int64_t number) const {
  if (number < 0) return nullptr;
  const Value& value = values_[static_cast<size_t>(number)];
  return context.places[static_cast<size_t>(value.root)] + value.root_offset;
}

void Program::run_torch(Context& context, size_t index) const {
  const Step& step = steps_[index];
  const auto y = static_cast<size_t>(step.values.y);
  context.results[y] = step.torch->run(place_of(context, step.values.x));
  context.places[y] = float_data(*context.results[y]);
}

void Program::run_part(const Context& context, const Region& region, const Unit& unit, int64_t part,
                       int64_t slot) const {
  for (size_t i = unit.first; i < unit.last; ++i) {
    const Step& step = steps_[region.stages[i].step];
    float* arena = context.arena->data();
    const Operands operands{place_of(context, step.values.x),
                            place_of(context, step.values.residual),
                            place_of(context, step.values.y), arena + step.shared_offset,
                            arena + own_offset_ + own_floats_ * slot};
    step.task->run(region.stages[i].stage, part, operands);
  }
}

// One thread's way through a region. The first thread notes when each unit begins, if `begins`.
void Program::work(Context& context, const Region& region, int64_t slot, int64_t* begins) const {
  for (const Unit& unit : region.units) {
    wait_until(context.done, unit.parts_before);
    if (begins && slot == 0) *begins++ = now();
    for (int64_t i = 0; i < unit.parts; ++i) {
      const int64_t part = (slot + i) % unit.parts;
      std::atomic<uint32_t>& claim = context.claims[static_cast<size_t>(unit.parts_before + part)];
      if (claim.load(std::memory_order_relaxed) == context.region) continue;
      if (claim.exchange(context.region, std::memory_order_relaxed) == context.region) continue;
      run_part(context, region, unit, part, slot);
      context.done.fetch_add(1, std::memory_order_release);
    }
  }
}

void Program::run_region(Context& context, const Region& region, bool parallel,
                         int64_t* begins) const {
  if (threads_ == 1 || !parallel || !region.has_parts()) {
    for (const Unit& unit : region.units) {
      if (begins) *begins++ = now();
      for (int64_t part = 0; part < unit.parts; ++part) run_part(context, region, unit, part, 0);
    }
    return;
  }
  ++context.region;
  context.done.store(0, std::memory_order_relaxed);
  torch::stable::parallel_for(0, threads_, 1,
                              [&](int64_t slot, int64_t) { work(context, region, slot, begins); });
}

void Program::run_steps(Context& context, bool parallel) const {
  for (size_t i = 0; i < regions_.size(); ++i) {
    run_region(context, regions_[i], parallel);
    if (i < calls_.size()) run_torch(context, calls_[i]);
  }
  for (const size_t call : calls_) {
    context.results[static_cast<size_t>(steps_[call].values.y)].reset();
  }
}

void Program::run(const std::vector<const float*>& inputs,
                  const std::vector<float*>& outputs) const {
  const Loan loan(*this);
  bind(*loan, inputs, outputs);
  run_steps(*loan, parallel_);
}

void Program::run_each(const std::vector<Samples<const float>>& inputs,
                       const std::vector<Samples<float>>& outputs, int64_t count,
                       bool apart) const {
  const int64_t shared_out = apart && threads_ > 1 ? count / threads_ * threads_ : 0;
  std::atomic<int64_t> next{0};
  const auto run_until = [&](int64_t end, bool parallel) {
    const Loan loan(*this);
    std::vector<const float*> sources(inputs.size());
    std::vector<float*> results(outputs.size());
    for (int64_t i = next++; i < end; i = next++) {
      for (size_t k = 0; k < inputs.size(); ++k) sources[k] = inputs[k].first + i * inputs[k].step;
      for (size_t k = 0; k < outputs.size(); ++k) {
        results[k] = outputs[k].first + i * outputs[k].step;
      }
      bind(*loan, sources, results);
      run_steps(*loan, parallel);
    }
  };
  if (shared_out > 0) {
    torch::stable::parallel_for(0, threads_, 1,
                                [&](int64_t, int64_t) { run_until(shared_out, false); });
  }
  next = shared_out;
  run_until(count, parallel_);
}

std::vector<Span> Program::run_watched(const std::vector<const float*>& inputs,
                                       const std::vector<float*>& outputs) const {
  const Loan loan(*this);
  Context& context = *loan;
  bind(context, inputs, outputs);
  const int64_t begin = now();
  std::vector<Span> spans;
  const auto watch_region = [&](size_t first, size_t last) {
    const Region region = make_region(first, last, true);
    std::vector<int64_t> begins(region.units.size());
    run_region(context, region, parallel_, begins.data());
    // A step lasts until the next one begins; one without parts takes no time.
    std::vector<Span> reversed;
    int64_t end = now();
    size_t unit = region.units.size();
    for (size_t step = last; step-- > first;) {
      int64_t step_begin = end;
      for (; unit > 0 && region.stages[region.units[unit - 1].first].step == step; --unit) {
        step_begin = begins[unit - 1];
      }
      reversed.push_back({step_begin - begin, end - begin});
      end = step_begin;
    }
    spans.insert(spans.end(), reversed.rbegin(), reversed.rend());
  };
  size_t first = 0;
  for (const size_t call : calls_) {
    watch_region(first, call);
    const int64_t call_begin = now();
    run_torch(context, call);
    spans.push_back({call_begin - begin, now() - begin});
    first = call + 1;
  }
  watch_region(first, steps_.size());
  // Copies from and to images count with the step that they are for.
  std::vector<Span> added;
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (i > 0 && steps_[i].added == steps_[i - 1].added) {
      added.back().end = spans[i].end;
    } else {
      added.push_back(spans[i]);
    }
  }
  return added;
}

}  // namespace sparselt
