// SPDX-License-Identifier: Apache-2.0
//
// A network, or a stretch of one, for inputs of one shape, as a list of steps that run in one call.
//
// Values are stretches of floats: inputs and outputs of the caller, constants, results of torch's
// operators, and the rest, which lie in an arena by a plan of their lifetimes. A step is a task
// (ops/task.h) or a call of torch. Tasks between two calls of torch make a region, which torch's
// pool of threads enters once: each thread walks through all units of the region (a stage of a
// task, or several stages that are one part each), computes the parts that nobody has claimed, its
// own first, and waits until the unit is done by everybody. No thread waits for another to arrive:
// whoever is there computes all, so any number of threads will do, and one is enough.
//
// Values lie as in torch, in panels where writer and readers agree on them (ops/panel_layout.h),
// or, in a program for batches, with images innermost (ops/image_layout.h).
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ops/image_task.h"
#include "ops/ops.h"
#include "ops/task.h"
#include "program/memory.h"

namespace sparselt {

// Values that a step reads and writes; residual is -1 for none.
struct StepValues {
  int64_t x;
  int64_t residual;
  int64_t y;
};

// What torch computes: from the place of x, a new contiguous tensor.
class TorchCall {
 public:
  TorchCall() = default;
  TorchCall(const TorchCall&) = delete;
  TorchCall& operator=(const TorchCall&) = delete;
  virtual ~TorchCall() = default;
  virtual Tensor run(float* x) const = 0;
};

// The same input or output of several runs; `step` is 0 where all runs share it.
template <class T>
struct Samples {
  T* first;
  int64_t step;  // in floats
};

// Nanoseconds from the begin of the run.
struct Span {
  int64_t begin;
  int64_t end;
};

class Program {
 public:
  // `threads`: what tasks are shared out to. `images_innermost`: whether tasks that can do so keep
  // their values like that.
  Program(int64_t threads, std::shared_ptr<ArenaPool> pool, bool images_innermost = false);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  Team team() const;
  int64_t handle() const { return handle_; }
  bool images_innermost() const { return images_innermost_; }
  // The live program of a handle, which is a plain number so that operators can take it; throws
  // where there is none.
  static Program& of_handle(int64_t handle);

  // Each returns the number of the new value.
  int64_t add_input(int64_t floats);
  int64_t add_constant(const float* data, int64_t floats);  // outlives the program
  int64_t add_value(int64_t floats);
  int64_t add_part(int64_t whole, int64_t offset, int64_t floats);  // floats within another value
  // Makes an earlier value of a task a part of another; false where it cannot be one.
  bool lay_in(int64_t value, int64_t whole, int64_t offset);
  void add_output(int64_t value);

  // `images` computes the same with images innermost; null where there is none. A layer's own task
  // is made where it is wanted, since its code may take a while to generate.
  void add_task(TaskPointer task, const StepValues& values, ImageTaskPointer images = nullptr);
  void add_layer(std::function<TaskPointer()> make, const StepValues& values,
                 ImageTaskPointer images);
  void add_torch(std::unique_ptr<TorchCall> call, const StepValues& values);
  // Keeps what tasks point into.
  void keep(Parts tensors);

  // Plans the memory and prepares the tasks; nothing can be added any more.
  void finish();

  // From any thread, and from several at once. One pointer an input and output, in the order they
  // were added.
  void run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs) const;
  // As many runs as there are samples, of a program for one. With `apart`, each thread runs samples
  // of its own, each from begin to end and in an arena of its own, as far as there are as many for
  // all threads; all of them together run the others. The bits are the same.
  void run_each(const std::vector<Samples<const float>>& inputs,
                const std::vector<Samples<float>>& outputs, int64_t count, bool apart) const;
  // The same, with the time of each step that was added: from when its first stage may begin until
  // the next step's may.
  std::vector<Span> run_watched(const std::vector<const float*>& inputs,
                                const std::vector<float*>& outputs) const;

  // Whether a region runs on all threads or on the calling one.
  void set_parallel(bool parallel) { parallel_ = parallel; }
  bool has_parts() const;  // whether a second thread would find anything to do
  int64_t arena_floats() const { return arena_floats_; }
  int64_t num_in_panels() const;                            // values that are kept in panels
  int64_t num_in_images() const { return num_in_images_; }  // steps that run with images innermost
  int64_t num_turns() const { return num_turns_; }          // copies from one layout to the other
  int64_t num_steps() const { return num_steps_; }          // that were added

 private:
  enum class Place { kInput, kOutput, kConstant, kTorch, kArena };
  struct Value {
    Place place;
    int64_t floats;
    int64_t root;         // the value that this one lies in; itself for most
    int64_t root_offset;  // in floats
    int64_t index;        // of the input or output
    const float* data;    // of a constant
    int64_t offset;       // in the arena
    std::optional<PanelLayout> panels;
  };
  struct Step {
    TaskPointer task;
    std::function<TaskPointer()> make_task;  // this and the next until `finish`
    ImageTaskPointer images;
    std::unique_ptr<TorchCall> torch;
    StepValues values;
    int64_t added;          // its number among the steps that were added
    int64_t shared_offset;  // in the arena
  };
  struct StageOfStep {
    size_t step;
    int64_t stage;
  };
  // One stage of several parts, or stages of one part each, which one thread runs in a row.
  struct Unit {
    size_t first;  // of the region's stages
    size_t last;   // exclusive
    int64_t parts;
    int64_t parts_before;  // of the region's earlier units
  };
  // Tasks between two calls of torch.
  struct Region {
    std::vector<StageOfStep> stages;
    std::vector<Unit> units;
    int64_t parts = 0;
    bool has_parts() const { return parts > static_cast<int64_t>(units.size()); }
  };
  struct Context;
  class Loan;

  int64_t add(Place place, int64_t floats, int64_t index = 0, const float* data = nullptr);
  const Value& value(int64_t number) const;
  std::unique_ptr<Context> new_context() const;
  Step& add_step(const StepValues& values);
  std::vector<int64_t> last_uses() const;
  class ImagePlan;
  void turn_to_images();
  std::optional<PanelLayout> panels_for(int64_t number) const;
  void lay_out_panels();
  void share_in_place();
  void plan_arena();
  // Of some tasks; with `apart`, each stage is a unit of its own.
  Region make_region(size_t first_step, size_t last_step, bool apart = false) const;
  void bind(Context& context, const std::vector<const float*>& inputs,
            const std::vector<float*>& outputs) const;
  float* place_of(const Context& context, int64_t value) const;
  void run_torch(Context& context, size_t step) const;
  void run_part(const Context& context, const Region& region, const Unit& unit, int64_t part,
                int64_t slot) const;
  void run_region(Context& context, const Region& region, bool parallel,
                  int64_t* begins = nullptr) const;
  void run_steps(Context& context, bool parallel) const;
  void work(Context& context, const Region& region, int64_t slot, int64_t* begins) const;

  const int64_t threads_;
  const bool images_innermost_;
  const std::shared_ptr<ArenaPool> pool_;
  int64_t handle_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t num_steps_ = 0;
  int64_t num_in_images_ = 0;
  int64_t num_turns_ = 0;
  int64_t num_outputs_ = 0;
  int64_t num_inputs_ = 0;
  std::vector<Parts> kept_;      // what tasks point into
  std::vector<Region> regions_;  // one before each call of torch, and one after the last
  std::vector<size_t> calls_;    // the steps that are calls of torch
  int64_t arena_floats_ = 0;
  int64_t own_floats_ = 0;
  int64_t own_offset_ = 0;
  bool parallel_ = true;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Context>> contexts_;
};

}  // namespace sparselt
