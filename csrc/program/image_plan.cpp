// SPDX-License-Identifier: Apache-2.0
//
// Which steps of a program run with images innermost, and the copies from and to torch's layout
// where they meet others.
#include <algorithm>
#include <utility>

#include "program/image_glue.h"
#include "program/program.h"

namespace sparselt {

// A value that a step with images innermost reads or writes gets a twin, which lies like that. Both
// exist where other steps, or the caller, meet the value too, with a copy between them.
class Program::ImagePlan {
 public:
  explicit ImagePlan(Program& program) : program_(program), steps_(program.steps_) {}

  // Layers take their values as images wherever they lie, the others where they lie so already.
  void choose() {
    do {
      const size_t count = program_.values_.size();
      maps_.assign(count, {});
      in_images_.assign(steps_.size(), false);
      for (size_t i = 0; i < steps_.size(); ++i) in_images_[i] = take(steps_[i]);
      for (size_t i = 0; i < steps_.size(); ++i) widen_border(i);
    } while (drop_misfits());
    for (size_t i = 0; i < steps_.size(); ++i) {
      for (const int64_t value : {steps_[i].values.x, steps_[i].values.residual}) {
        if (value >= 0) reads_.emplace_back(value, in_images_[i]);
      }
    }
  }

  // The steps anew, with copies in between.
  std::vector<Step> steps() {
    twins_.assign(program_.values_.size(), -1);
    std::vector<Step> made;
    for (size_t i = 0; i < steps_.size(); ++i) {
      Step step = std::move(steps_[i]);
      if (!in_images_[i]) {
        if (step.make_task) step.task = step.make_task();
        made.push_back(std::move(step));
        continue;
      }
      const StepValues plain = step.values;
      for (int64_t* operand : {&step.values.x, &step.values.residual}) {
        if (*operand < 0) continue;
        if (twin(*operand) < 0) {
          const int64_t from = *operand;
          make_twin(from);
          made.push_back(
              turn(make_to_images_task(program_.team(), map(from)), from, twin(from), step.added));
        }
        *operand = twin(*operand);
      }
      make_twin(plain.y);
      step.values.y = twin(plain.y);
      step.images->lay_out_maps(map(plain.x),
                                plain.residual < 0 ? std::nullopt : maps_[index(plain.residual)],
                                map(plain.y));
      step.task = std::move(step.images);
      const int64_t added = step.added;
      made.push_back(std::move(step));
      ++program_.num_in_images_;
      if (is_met_plain(plain.y)) {
        made.push_back(turn(make_from_images_task(program_.team(), map(plain.y)), twin(plain.y),
                            plain.y, added));
      }
    }
    return made;
  }

 private:
  static size_t index(int64_t value) { return static_cast<size_t>(value); }
  const ImageLayout& map(int64_t value) const { return *maps_[index(value)]; }
  int64_t twin(int64_t value) const { return twins_[index(value)]; }

  // Whether a step runs with images innermost; its values have maps from then on.
  bool take(const Step& step) {
    const StepValues& values = step.values;
    if (!step.images) return false;
    std::optional<ImageLayout> x = maps_[index(values.x)];
    if (!x) x = step.images->own_map();
    if (!x || !step.images->accept(*x) || !is_of(values.x, *x)) return false;
    const ImageLayout y = step.images->y_map();
    if (values.residual >= 0) {
      std::optional<ImageLayout>& residual = maps_[index(values.residual)];
      const bool brings = step.images->own_map().has_value();
      if (residual ? !residual->same_map(y) : !brings || !is_of(values.residual, y)) return false;
      if (!residual) residual = y;
    }
    if (maps_[index(values.y)] || !is_of(values.y, y) || times_written(values.y) != 1) return false;
    maps_[index(values.x)] = x;
    maps_[index(values.y)] = y;
    return true;
  }

  bool is_of(int64_t value, const ImageLayout& map) const {
    return program_.value(value).floats == map.images * map.channels * map.area();
  }

  int64_t times_written(int64_t value) const {
    return std::count_if(steps_.begin(), steps_.end(),
                         [&](const Step& step) { return step.values.y == value; });
  }

  void widen_border(size_t i) {
    const std::optional<ImageLayout> own =
        in_images_[i] ? steps_[i].images->own_map() : std::nullopt;
    if (!own) return;
    ImageLayout& x = *maps_[index(steps_[i].values.x)];
    x.pad_h = std::max(x.pad_h, own->pad_h);
    x.pad_w = std::max(x.pad_w, own->pad_w);
  }

  // Layers that cannot read what others widened stay as they are in torch.
  bool drop_misfits() {
    bool dropped = false;
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (!in_images_[i] || steps_[i].images->can_read(map(steps_[i].values.x))) continue;
      steps_[i].images.reset();
      dropped = true;
    }
    return dropped;
  }

  // Whether a value, or one that shares its memory, is met as torch lays it out.
  bool is_met_plain(int64_t number) const {
    const int64_t root = program_.value(number).root;
    if (program_.value(root).place == Place::kOutput) return true;
    return std::any_of(reads_.begin(), reads_.end(), [&](const std::pair<int64_t, bool>& read) {
      return program_.value(read.first).root == root && (!read.second || read.first != number);
    });
  }

  void make_twin(int64_t value) {
    twins_[index(value)] = program_.add_value(map(value).floats());
    twins_.resize(program_.values_.size(), -1);
  }

  Step turn(TaskPointer task, int64_t from, int64_t to, int64_t added) {
    ++program_.num_turns_;
    Step step{};
    step.task = std::move(task);
    step.values = {from, -1, to};
    step.added = added;
    return step;
  }

  Program& program_;
  std::vector<Step>& steps_;
  std::vector<std::optional<ImageLayout>> maps_;
  std::vector<bool> in_images_;
  std::vector<int64_t> twins_;
  std::vector<std::pair<int64_t, bool>> reads_;  // values, and whether as images
};

void Program::turn_to_images() {
  if (!images_innermost_) return;
  ImagePlan plan(*this);
  plan.choose();
  steps_ = plan.steps();
}

}  // namespace sparselt
