// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ops/partition.h"
#include "program/glue.h"

namespace sparselt {
namespace {

// Rows or columns of x that output `index` of an axis meets.
Range window(const Axis& axis, int64_t index) {
  const int64_t begin = index * axis.stride - axis.padding;
  return {std::max<int64_t>(0, begin), std::min(axis.size, begin + axis.kernel)};
}

// A NaN of either wins. Two plain selections, which compilers turn into vectors.
inline float larger(float a, float b) {
  const float most = a > b ? a : b;
  return a != a ? a : most;
}
inline float sum(float a, float b) { return a + b; }

// Pools the rows of each window into one row, which lies in the thread's scratch, and then the
// columns: taps over taps of vectors instead of one window after the other.
class PoolTask : public Task {
 public:
  PoolTask(const Team& team, int64_t planes, const Axis& h, const Axis& w)
      : h_(h), w_(w), planes_(planes), parts_(copying_parts(team, planes, h.size * w.size)) {}

  int64_t parts(int64_t) const override { return parts_; }
  int64_t own_floats() const override { return w_.size; }

 protected:
  template <class F>
  void pool_rows(const float* plane, Range rows, float* row, const F& f) const {
    std::copy_n(plane + rows.begin * w_.size, w_.size, row);
    for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
      const float* from = plane + r * w_.size;
      for (int64_t i = 0; i < w_.size; ++i) row[i] = f(row[i], from[i]);
    }
  }

  template <class F>
  void pool_columns(const float* row, float* y, const F& f) const {
    // Windows that lie inside the row meet it one tap after the other.
    const int64_t begin = std::min(w_.out(), (w_.padding + w_.stride - 1) / w_.stride);
    const int64_t room = w_.size + w_.padding - w_.kernel;
    const Range inside{begin, std::max(begin, room < 0 ? 0 : room / w_.stride + 1)};
    if (w_.stride == 1) {
      pool_taps<1>(row, inside, y, f);
    } else if (w_.stride == 2) {
      pool_taps<2>(row, inside, y, f);
    } else {
      pool_taps<0>(row, inside, y, f);
    }
    for (int64_t q = 0; q < inside.begin; ++q) y[q] = pool_window(row, window(w_, q), f);
    for (int64_t q = inside.end; q < w_.out(); ++q) y[q] = pool_window(row, window(w_, q), f);
  }

  Range planes_of(int64_t part) const { return even_range(planes_, part, parts_); }

  const Axis h_;
  const Axis w_;

 private:
  // A stride known to the compiler (0: any) is what it can turn into shuffles.
  template <int64_t STRIDE, class F>
  void pool_taps(const float* row, Range outputs, float* y, const F& f) const {
    const int64_t stride = STRIDE == 0 ? w_.stride : STRIDE;
    const float* first = row - w_.padding;
    for (int64_t q = outputs.begin; q < outputs.end; ++q) y[q] = first[q * stride];
    for (int64_t tap = 1; tap < w_.kernel; ++tap) {
      for (int64_t q = outputs.begin; q < outputs.end; ++q) {
        y[q] = f(y[q], first[q * stride + tap]);
      }
    }
  }

  template <class F>
  static float pool_window(const float* row, Range columns, const F& f) {
    float value = row[columns.begin];
    for (int64_t i = columns.begin + 1; i < columns.end; ++i) value = f(value, row[i]);
    return value;
  }

  const int64_t planes_;
  const int64_t parts_;
};

class MaxPoolTask final : public PoolTask {
 public:
  using PoolTask::PoolTask;

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range planes = planes_of(part);
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
      const float* x = o.x + plane * h_.size * w_.size;
      for (int64_t p = 0; p < h_.out(); ++p) {
        pool_rows(x, window(h_, p), o.own, larger);
        pool_columns(o.own, o.y + (plane * h_.out() + p) * w_.out(), larger);
      }
    }
  }
};

class MeanPoolTask final : public PoolTask {
 public:
  MeanPoolTask(const Team& team, int64_t planes, const Axis& h, const Axis& w, bool count_padding)
      : PoolTask(team, planes, h, w), count_padding_(count_padding) {}

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range planes = planes_of(part);
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
      const float* x = o.x + plane * h_.size * w_.size;
      for (int64_t p = 0; p < h_.out(); ++p) {
        float* y = o.y + (plane * h_.out() + p) * w_.out();
        pool_rows(x, window(h_, p), o.own, sum);
        pool_columns(o.own, y, sum);
        for (int64_t q = 0; q < w_.out(); ++q) {
          y[q] /= static_cast<float>(counted(h_, p) * counted(w_, q));
        }
      }
    }
  }

 private:
  int64_t counted(const Axis& axis, int64_t index) const {
    if (!count_padding_) {
      const Range range = window(axis, index);
      return range.end - range.begin;
    }
    const int64_t begin = index * axis.stride - axis.padding;
    return std::min(axis.size + axis.padding, begin + axis.kernel) - begin;
  }

  const bool count_padding_;
};

class MeanTask final : public Task {
 public:
  MeanTask(const Team& team, int64_t rows, int64_t floats)
      : rows_(rows), floats_(floats), parts_(copying_parts(team, rows, floats)) {}

  int64_t parts(int64_t) const override { return parts_; }

  void run(int64_t, int64_t part, const Operands& o) const override {
    const Range rows = even_range(rows_, part, parts_);
    for (int64_t row = rows.begin; row < rows.end; ++row) o.y[row] = mean(o.x + row * floats_);
  }

 private:
  // Sums of every 16th value side by side: vectors, and less rounding than one long sum.
  float mean(const float* x) const {
    constexpr int64_t kLanes = 16;
    float sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= floats_; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane];
    }
    float total = 0.0f;
    for (; i < floats_; ++i) total += x[i];
    for (const float lane : sums) total += lane;
    return total / static_cast<float>(floats_);
  }

  const int64_t rows_;
  const int64_t floats_;
  const int64_t parts_;
};

}  // namespace

TaskPointer make_max_pool_task(const Team& team, int64_t planes, const Axis& h, const Axis& w) {
  return std::make_unique<MaxPoolTask>(team, planes, h, w);
}

TaskPointer make_mean_pool_task(const Team& team, int64_t planes, const Axis& h, const Axis& w,
                                bool count_padding) {
  return std::make_unique<MeanPoolTask>(team, planes, h, w, count_padding);
}

TaskPointer make_mean_task(const Team& team, int64_t rows, int64_t floats) {
  return std::make_unique<MeanTask>(team, rows, floats);
}

}  // namespace sparselt
