// SPDX-License-Identifier: Apache-2.0
#include "program/glue.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ops/partition.h"

namespace sparselt {
namespace {

// Written so that a NaN stays a NaN.
inline float clamp(float value, float lower, float upper) {
  value = value < lower ? lower : value;
  return value > upper ? upper : value;
}

// exp(x) to about 1e-7 of itself, without branches or calls (after Cephes' expf: 2^n times a
// polynomial of what is left of x / ln 2 after rounding). A NaN stays a NaN.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // A NaN has no whole number; its product with any power of two is a NaN.
  const float whole = n == n ? n : 0.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// x / 2 * (1 + erf(x / sqrt(2))), erf to 1.5e-7 after Abramowitz and Stegun, 7.1.26.
inline float gelu(float x) {
  const float a = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exponential(-a * a);  // 1 - erf(a)
  return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

inline float hardswish(float x) { return x * clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }

template <class F>
void transform(Range range, const Operands& o, float lower, float upper, const F& f) {
  const float* x = o.x;
  float* y = o.y;
  for (int64_t i = range.begin; i < range.end; ++i) y[i] = clamp(f(x[i]), lower, upper);
}

template <class F>
void combine(Range range, const Operands& o, float lower, float upper, const F& f) {
  const float* x = o.x;
  const float* z = o.residual;
  float* y = o.y;
  for (int64_t i = range.begin; i < range.end; ++i) y[i] = clamp(f(x[i], z[i]), lower, upper);
}

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
    switch (element_) {
      case Element::kIdentity:
        return transform(range, o, lower_, upper_, [](float x) { return x; });
      case Element::kAdd:
        return combine(range, o, lower_, upper_, [](float x, float z) { return x + z; });
      case Element::kMultiply:
        return combine(range, o, lower_, upper_, [](float x, float z) { return x * z; });
      case Element::kSigmoid:
        return transform(range, o, lower_, upper_, sigmoid);
      case Element::kSilu:
        return transform(range, o, lower_, upper_, [](float x) { return x * sigmoid(x); });
      case Element::kGelu:
        return transform(range, o, lower_, upper_, gelu);
      case Element::kHardswish:
        return transform(range, o, lower_, upper_, hardswish);
    }
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
      transform({plane * area_, (plane + 1) * area_}, o, lower_, upper_,
                [=](float x) { return x * scale + shift; });
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

}  // namespace sparselt
