// SPDX-License-Identifier: Apache-2.0
//
// A layer's work for inputs of one shape, made once: the arguments are checked, the weight and the
// result are shared out, and what a run needs beside its operands is known. Operators make a task
// at each call (ops/run_task.cpp), compiled programs keep it (program/). Knows no torch.
#pragma once

#include <stdint.h>

#include <memory>

#include "ops/panel_layout.h"

namespace sparselt {

// The threads that a task is shared out to, and from how many multiply-adds on a second one is
// worth waking.
struct Team {
  int64_t threads;
  int64_t least_work;
  int64_t threads_for(int64_t multiply_adds) const {
    return multiply_adds < least_work ? 1 : threads;
  }
};

// What a run reads and writes. Scratch is aligned to 64 bytes and holds nothing from run to run.
struct Operands {
  const float* x;
  const float* residual;  // or null
  float* y;
  float* shared;  // scratch that one stage leaves for the next: shared_floats()
  float* own;     // scratch of the running thread: own_floats()
};

// Stages run one after the other, the parts of a stage in any order and at the same time. Parts
// that run at the same time never write the same element.
class Task {
 public:
  Task() = default;
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;
  virtual ~Task() = default;

  virtual int64_t stages() const { return 1; }
  virtual int64_t parts(int64_t stage) const = 0;
  virtual int64_t shared_floats() const { return 0; }
  virtual int64_t own_floats() const { return 0; }
  virtual void run(int64_t stage, int64_t part, const Operands& operands) const = 0;

  // Whether y may lie where x does, or where the residual does.
  virtual bool may_overwrite_x() const { return false; }
  virtual bool may_overwrite_residual() const { return false; }

  // How x would have to lie in panels for a run to read it as it is, and how y, and the residual,
  // could, with a residual or none: of any period. None where a value can only lie as in torch.
  virtual std::optional<PanelLayout> x_in_panels() const { return {}; }
  virtual std::optional<PanelLayout> y_in_panels(bool) const { return {}; }
  // Says how the values of each run lie.
  virtual void lay_out(const Layouts&) {}

  // Computes once what each run would compute anew; worth its time and memory where there are many.
  virtual void prepare() {}
};

using TaskPointer = std::unique_ptr<Task>;

constexpr int64_t kScratchGrain = 16;  // floats of a cache line

inline int64_t whole_lines(int64_t floats) {
  return (floats + kScratchGrain - 1) / kScratchGrain * kScratchGrain;
}

}  // namespace sparselt
