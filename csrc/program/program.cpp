// SPDX-License-Identifier: Apache-2.0
#include "program/program.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <unordered_map>

#include "program/context.h"

namespace sparselt {
namespace {

// From so many multiply-adds on, a unit is shared out: about what the wait at its end costs.
constexpr int64_t kLeastWork = 1 << 14;

std::mutex live_mutex;
std::unordered_map<int64_t, Program*> live;
int64_t next_handle = 1;

}  // namespace

Program::Program(int64_t threads, std::shared_ptr<ArenaPool> pool, bool images_innermost)
    : threads_(std::max<int64_t>(1, threads)),
      images_innermost_(images_innermost),
      pool_(std::move(pool)) {
  const std::lock_guard<std::mutex> lock(live_mutex);
  handle_ = next_handle++;
  live[handle_] = this;
}

Program::~Program() {
  const std::lock_guard<std::mutex> lock(live_mutex);
  live.erase(handle_);
}

Program& Program::of_handle(int64_t handle) {
  const std::lock_guard<std::mutex> lock(live_mutex);
  const auto found = live.find(handle);
  STD_TORCH_CHECK(found != live.end(), "program: there is none with handle ", handle);
  return *found->second;
}

Team Program::team() const { return {threads_, kLeastWork}; }

int64_t Program::add(Place place, int64_t floats, int64_t index, const float* data) {
  const auto number = static_cast<int64_t>(values_.size());
  values_.push_back({place, floats, number, 0, index, data, 0, {}});
  return number;
}

int64_t Program::add_input(int64_t floats) { return add(Place::kInput, floats, num_inputs_++); }

int64_t Program::add_constant(const float* data, int64_t floats) {
  return add(Place::kConstant, floats, 0, data);
}

int64_t Program::add_value(int64_t floats) { return add(Place::kArena, floats); }

int64_t Program::add_part(int64_t whole, int64_t offset, int64_t floats) {
  const Value in = value(whole);
  STD_TORCH_CHECK(offset >= 0 && offset + floats <= in.floats, "part: ", offset, " + ", floats,
                  " floats do not lie in ", in.floats);
  const int64_t number = add(in.place, floats);
  values_.back().root = in.root;
  values_.back().root_offset = in.root_offset + offset;
  return number;
}

bool Program::lay_in(int64_t number, int64_t whole, int64_t offset) {
  const Value in = value(whole);
  const Value part = value(number);
  if (part.root != number || part.place != Place::kArena || in.place != Place::kArena) return false;
  if (number == in.root || offset + part.floats > in.floats) return false;
  for (Value& other : values_) {
    if (other.root != number) continue;
    other.root = in.root;
    other.root_offset += in.root_offset + offset;
  }
  return true;
}

void Program::add_output(int64_t number) {
  Value& root = values_[static_cast<size_t>(value(number).root)];
  STD_TORCH_CHECK(root.place == Place::kArena && root.floats == value(number).floats,
                  "output: expected a whole value of a task that is no output yet");
  root.place = Place::kOutput;
  root.index = num_outputs_++;
}

const Program::Value& Program::value(int64_t number) const {
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(values_.size()),
                  "value: there is none with number ", number);
  return values_[static_cast<size_t>(number)];
}

Program::Step& Program::add_step(const StepValues& values) {
  value(values.x);
  value(values.y);
  if (values.residual >= 0) value(values.residual);
  steps_.emplace_back();
  steps_.back().values = values;
  steps_.back().added = num_steps_++;
  return steps_.back();
}

void Program::add_task(TaskPointer task, const StepValues& values, ImageTaskPointer images) {
  Step& step = add_step(values);
  step.task = std::move(task);
  if (images_innermost_) step.images = std::move(images);
}

void Program::add_layer(std::function<TaskPointer()> make, const StepValues& values,
                        ImageTaskPointer images) {
  Step& step = add_step(values);
  if (images) {
    step.make_task = std::move(make);
    step.images = std::move(images);
  } else {
    step.task = make();
  }
}

void Program::add_torch(std::unique_ptr<TorchCall> call, const StepValues& values) {
  STD_TORCH_CHECK(value(values.y).place == Place::kArena && value(values.y).root == values.y,
                  "torch's result: expected a new value");
  values_[static_cast<size_t>(values.y)].place = Place::kTorch;
  add_step(values).torch = std::move(call);
}

void Program::keep(Parts tensors) { kept_.push_back(std::move(tensors)); }

// By root: the last step that reads or writes it, -1 for none.
std::vector<int64_t> Program::last_uses() const {
  std::vector<int64_t> last(values_.size(), -1);
  for (size_t i = 0; i < steps_.size(); ++i) {
    const StepValues& values = steps_[i].values;
    for (const int64_t number : {values.x, values.residual, values.y}) {
      if (number >= 0) last[static_cast<size_t>(value(number).root)] = static_cast<int64_t>(i);
    }
  }
  return last;
}

// The panels that a value can be kept in: those that its writer and all its readers agree on.
std::optional<PanelLayout> Program::panels_for(int64_t number) const {
  const auto lies_in = [&](const Value& other) { return other.root == number; };
  if (value(number).place != Place::kArena) return {};
  if (std::count_if(values_.begin(), values_.end(), lies_in) != 1) return {};
  std::optional<PanelLayout> found;
  for (const Step& step : steps_) {
    const StepValues& values = step.values;
    const Task* task = step.task.get();
    std::vector<std::optional<PanelLayout>> met;
    if (values.y == number) {
      met.push_back(task ? task->y_in_panels(values.residual >= 0) : std::nullopt);
    }
    if (values.residual == number) met.push_back(task ? task->y_in_panels(true) : std::nullopt);
    if (values.x == number) met.push_back(task ? task->x_in_panels() : std::nullopt);
    for (const std::optional<PanelLayout>& layout : met) {
      if (!layout || (found && !found->fits(*layout))) return {};
      if (!found || found->period == 0) found = layout;
    }
  }
  return found ? found->chosen() : found;
}

void Program::lay_out_panels() {
  for (size_t i = 0; i < values_.size(); ++i) {
    values_[i].panels = panels_for(static_cast<int64_t>(i));
    if (values_[i].panels) values_[i].floats = values_[i].panels->floats();
  }
  const auto panels_of = [&](int64_t number) {
    return number < 0 ? std::nullopt : value(number).panels;
  };
  for (const Step& step : steps_) {
    const StepValues& values = step.values;
    if (!step.task) continue;
    step.task->lay_out({panels_of(values.x), panels_of(values.residual), panels_of(values.y)});
  }
}

int64_t Program::num_in_panels() const {
  return std::count_if(values_.begin(), values_.end(),
                       [](const Value& v) { return v.panels.has_value(); });
}

// Lets a result take the place of an operand that dies with it, where the task allows that.
void Program::share_in_place() {
  std::vector<int64_t> last = last_uses();
  std::vector<bool> written(values_.size(), false);
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    const int64_t y = step.values.y;
    const Value result = value(y);
    const bool first = !written[static_cast<size_t>(result.root)];
    written[static_cast<size_t>(result.root)] = true;
    if (!step.task || result.root != y || !first || result.place != Place::kArena) continue;
    const bool x_allows = step.task->may_overwrite_x();
    const bool residual_allows = step.task->may_overwrite_residual();
    for (const int64_t operand : {step.values.residual, step.values.x}) {
      if (operand < 0) continue;
      const int64_t root = value(operand).root;
      const Value held = value(root);
      const bool as_x = value(step.values.x).root == root;
      const bool as_residual =
          step.values.residual >= 0 && value(step.values.residual).root == root;
      const bool allowed = (!as_x || x_allows) && (!as_residual || residual_allows);
      const bool whole = held.floats == value(operand).floats && held.floats == result.floats;
      const bool ours = held.place == Place::kArena || held.place == Place::kTorch;
      const bool dies = last[static_cast<size_t>(root)] == static_cast<int64_t>(i);
      if (!allowed || !whole || !ours || !dies) continue;
      for (Value& other : values_) {
        if (other.root == y) other.root = root;
      }
      last[static_cast<size_t>(root)] = last[static_cast<size_t>(y)];
      break;
    }
  }
}

void Program::plan_arena() {
  const std::vector<int64_t> last = last_uses();
  std::vector<int64_t> first(values_.size(), -1);
  int64_t own = 0;
  std::vector<Block> blocks;
  std::vector<int64_t*> places;  // where each block's offset is to be told
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    int64_t& begin = first[static_cast<size_t>(value(step.values.y).root)];
    if (begin < 0) begin = static_cast<int64_t>(i);
    if (!step.task) continue;
    own = std::max(own, step.task->own_floats());
    blocks.push_back(
        {step.task->shared_floats(), static_cast<int64_t>(i), static_cast<int64_t>(i)});
    places.push_back(&step.shared_offset);
  }
  for (size_t i = 0; i < values_.size(); ++i) {
    Value& value = values_[i];
    if (value.root != static_cast<int64_t>(i) || value.place != Place::kArena) continue;
    STD_TORCH_CHECK(first[i] >= 0 || last[i] < 0, "value ", i, " is read and never written");
    if (last[i] < 0) continue;
    blocks.push_back({value.floats, first[i], last[i]});
    places.push_back(&value.offset);
  }
  const MemoryPlan plan = plan_memory(blocks);
  for (size_t i = 0; i < blocks.size(); ++i) *places[i] = plan.offsets[i];
  own_offset_ = plan.floats;
  own_floats_ = whole_lines(own);
  arena_floats_ = own_offset_ + own_floats_ * threads_;
}

Program::Region Program::make_region(size_t first_step, size_t last_step, bool apart) const {
  Region region;
  for (size_t i = first_step; i < last_step; ++i) {
    const Task& task = *steps_[i].task;
    for (int64_t stage = 0; stage < task.stages(); ++stage) {
      const int64_t parts = task.parts(stage);
      if (parts == 0) continue;
      const size_t index = region.stages.size();
      region.stages.push_back({i, stage});
      const bool joins = !region.units.empty() && region.units.back().parts == 1 && !apart;
      if (parts == 1 && joins) {
        region.units.back().last = index + 1;
        continue;
      }
      region.units.push_back({index, index + 1, parts, region.parts});
      region.parts += parts;
    }
  }
  return region;
}

void Program::finish() {
  turn_to_images();
  lay_out_panels();
  share_in_place();
  plan_arena();
  size_t begin = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (steps_[i].task) {
      steps_[i].task->prepare();
      continue;
    }
    regions_.push_back(make_region(begin, i));
    calls_.push_back(i);
    begin = i + 1;
  }
  regions_.push_back(make_region(begin, steps_.size()));
}

bool Program::has_parts() const {
  return std::any_of(regions_.begin(), regions_.end(),
                     [](const Region& region) { return region.has_parts(); });
}

}  // namespace sparselt
