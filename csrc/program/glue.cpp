// SPDX-License-Identifier: Apache-2.0
#include "program/glue.h"

#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "ops/partition.h"

namespace sparselt {
namespace {

class ElementTask final : public Task {
 public:
  ElementTask(const Team& team, Element element, int64_t floats, float lower, float upper)
      : element_(element),
        floats_(floats),
        lower_(lower),
        upper_(upper),
        parts_(copying_parts(team, whole_lines(floats) / kScratchGrain, kScratchGrain)) {}

  int64_t parts(int64_t) const override { return parts_; }
  bool may_overwrite_x() const override { return true; }
  bool may_overwrite_residual() const override { return true; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range range = even_columns(floats_, part, parts_);
    const float* z = o.residual == nullptr ? nullptr : o.residual + range.begin;
    loops().elements(element_, range.end - range.begin, o.x + range.begin, z, o.y + range.begin,
                     lower_, upper_);
  }

 private:
  const Element element_;
  const int64_t floats_;
  const float lower_;
  const float upper_;
  const int64_t parts_;
};

class CopyTask final : public Task {
 public:
  CopyTask(const Team& team, int64_t rows, int64_t floats, int64_t x_stride, int64_t y_stride)
      : rows_(rows),
        floats_(floats),
        x_stride_(x_stride),
        y_stride_(y_stride),
        parts_(copying_parts(team, rows, floats)) {}

  int64_t parts(int64_t) const override { return parts_; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range rows = even_range(rows_, part, parts_);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      std::memcpy(o.y + row * y_stride_, o.x + row * x_stride_,
                  sizeof(float) * static_cast<size_t>(floats_));
    }
  }

 private:
  const int64_t rows_;
  const int64_t floats_;
  const int64_t x_stride_;
  const int64_t y_stride_;
  const int64_t parts_;
};

class AffineTask final : public Task {
 public:
  AffineTask(const Team& team, int64_t batch, int64_t channels, int64_t area, const float* scale,
             const float* shift, float lower, float upper)
      : planes_(batch * channels),
        channels_(channels),
        area_(area),
        scale_(scale),
        shift_(shift),
        lower_(lower),
        upper_(upper),
        parts_(copying_parts(team, planes_, area)) {}

  int64_t parts(int64_t) const override { return parts_; }
  bool may_overwrite_x() const override { return true; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range planes = even_range(planes_, part, parts_);
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
      const float scale = scale_[plane % channels_];
      const float shift = shift_[plane % channels_];
      const int64_t begin = plane * area_;
      loops().affine(area_, o.x + begin, scale, shift, o.y + begin, lower_, upper_);
    }
  }

 private:
  const int64_t planes_;
  const int64_t channels_;
  const int64_t area_;
  const float* scale_;
  const float* shift_;
  const float lower_;
  const float upper_;
  const int64_t parts_;
};

class BroadcastTask final : public Task {
 public:
  BroadcastTask(const Team& team, Element element, int64_t outer, int64_t period, int64_t inner)
      : element_(element),
        rows_(inner == 1 ? outer : outer * period),
        floats_(inner == 1 ? period : inner),
        period_(period),
        by_row_(inner > 1),
        parts_(copying_parts(team, rows_, floats_)) {}

  int64_t parts(int64_t) const override { return parts_; }
  bool may_overwrite_x() const override { return true; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Range rows = even_range(rows_, part, parts_);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* x = o.x + row * floats_;
      float* y = o.y + row * floats_;
      if (!by_row_) {
        loops().elements(element_, floats_, x, o.residual, y, -kInfinity, kInfinity);
        continue;
      }
      const float z = o.residual[row % period_];
      const bool adds = element_ == Element::kAdd;
      loops().affine(floats_, x, adds ? 1.0f : z, adds ? z : 0.0f, y, -kInfinity, kInfinity);
    }
  }

 private:
  const Element element_;
  const int64_t rows_;
  const int64_t floats_;
  const int64_t period_;
  const bool by_row_;
  const int64_t parts_;
};

class GatherTask final : public Task {
 public:
  GatherTask(const Team& team, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : sizes_(std::move(sizes)), strides_(std::move(strides)) {
    floats_ = sizes_.back();
    for (size_t i = 0; i + 1 < sizes_.size(); ++i) rows_ *= sizes_[i];
    parts_ = copying_parts(team, rows_, floats_);
  }

  int64_t parts(int64_t) const override { return parts_; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range rows = even_range(rows_, part, parts_);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* x = o.x + begin_of(row);
      float* y = o.y + row * floats_;
      const int64_t stride = strides_.back();
      if (stride == 1) {
        std::memcpy(y, x, sizeof(float) * static_cast<size_t>(floats_));
      } else {
        for (int64_t i = 0; i < floats_; ++i) y[i] = x[i * stride];
      }
    }
  }

 private:
  // Where a row of y begins in x.
  int64_t begin_of(int64_t row) const {
    int64_t begin = 0;
    for (size_t i = sizes_.size() - 1; i-- > 0; row /= sizes_[i]) {
      begin += row % sizes_[i] * strides_[i];
    }
    return begin;
  }

  const std::vector<int64_t> sizes_;
  const std::vector<int64_t> strides_;
  int64_t rows_ = 1;
  int64_t floats_;
  int64_t parts_;
};

// Softmax, or standardization by `epsilon` where there is one.
class RowTask final : public Task {
 public:
  RowTask(const Team& team, int64_t rows, int64_t floats, std::optional<float> epsilon)
      : rows_(rows),
        floats_(floats),
        epsilon_(epsilon),
        parts_(copying_parts(team, rows, floats)) {}

  int64_t parts(int64_t) const override { return parts_; }
  bool may_overwrite_x() const override { return true; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range rows = even_range(rows_, part, parts_);
    for (int64_t begin = rows.begin * floats_; begin < rows.end * floats_; begin += floats_) {
      if (epsilon_) {
        loops().standardize(floats_, o.x + begin, o.residual, *epsilon_, o.y + begin);
      } else {
        loops().softmax(floats_, o.x + begin, o.y + begin);
      }
    }
  }

 private:
  const int64_t rows_;
  const int64_t floats_;
  const std::optional<float> epsilon_;
  const int64_t parts_;
};

}  // namespace

TaskPointer make_element_task(const Team& team, Element element, int64_t floats, float lower,
                              float upper) {
  return std::make_unique<ElementTask>(team, element, floats, lower, upper);
}

TaskPointer make_copy_task(const Team& team, int64_t rows, int64_t floats, int64_t x_stride,
                           int64_t y_stride) {
  return std::make_unique<CopyTask>(team, rows, floats, x_stride, y_stride);
}

TaskPointer make_affine_task(const Team& team, int64_t batch, int64_t channels, int64_t area,
                             const float* scale, const float* shift, float lower, float upper) {
  return std::make_unique<AffineTask>(team, batch, channels, area, scale, shift, lower, upper);
}

TaskPointer make_broadcast_task(const Team& team, Element element, int64_t outer, int64_t period,
                                int64_t inner) {
  return std::make_unique<BroadcastTask>(team, element, outer, period, inner);
}

TaskPointer make_gather_task(const Team& team, std::vector<int64_t> sizes,
                             std::vector<int64_t> strides) {
  return std::make_unique<GatherTask>(team, std::move(sizes), std::move(strides));
}

TaskPointer make_softmax_task(const Team& team, int64_t rows, int64_t floats) {
  return std::make_unique<RowTask>(team, rows, floats, std::nullopt);
}

TaskPointer make_standardize_task(const Team& team, int64_t rows, int64_t floats, float epsilon) {
  return std::make_unique<RowTask>(team, rows, floats, epsilon);
}

}  // namespace sparselt
