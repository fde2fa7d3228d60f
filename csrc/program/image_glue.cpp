// SPDX-License-Identifier: Apache-2.0
#include "program/image_glue.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sparselt {
namespace {

constexpr int64_t kLanes = ImageLayout::kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A task that computes y pixel by pixel.
class PixelTask : public ImageTask {
 public:
  explicit PixelTask(const Team& team) : team_(team) {}

  int64_t parts(int64_t) const override { return parts_; }
  ImageLayout y_map() const override { return y_; }
  void lay_out_maps(const ImageLayout& x, const std::optional<ImageLayout>& residual,
                    const ImageLayout& y) override {
    x_ = x;
    residual_ = residual;
    y_ = y;
    parts_ = copying_parts(team_, y.pixels(), y.channels * kLanes);
  }
  void run(int64_t, int64_t part, const Operands& operands) const override {
    write_zeros(y_, part, parts_, operands.y);
    visit_pixels(y_, even_range(y_.pixels(), part, parts_), [&](const Pixel& at) {
      run_pixel(at, operands, operands.y + y_.place(at.group, at.line, at.column));
    });
  }

 protected:
  // Computes a vector of y.
  virtual void run_pixel(const Pixel& at, const Operands& operands, float* y) const = 0;

  int64_t count() const { return y_.channels * kLanes; }
  void combine(Element element, const float* x, const float* z, float* y) const {
    loops().elements(element, count(), x, z, y, -kInfinity, kInfinity);
  }

  ImageLayout x_{};
  std::optional<ImageLayout> residual_;
  ImageLayout y_{};

 private:
  const Team team_;
  int64_t parts_ = 1;
};

class ImageElementTask final : public PixelTask {
 public:
  ImageElementTask(const Team& team, Element element, float lower, float upper)
      : PixelTask(team), element_(element), lower_(lower), upper_(upper) {}

  bool accept(const ImageLayout& x) override {
    y_ = x;
    y_.pad_h = y_.pad_w = 0;
    return true;
  }
  bool may_overwrite_x() const override { return x_ == y_; }
  bool may_overwrite_residual() const override { return residual_ && *residual_ == y_; }

 private:
  void run_pixel(const Pixel& at, const Operands& o, float* y) const override {
    const float* x = o.x + x_.place(at.group, at.line, at.column);
    const float* z =
        residual_ ? o.residual + residual_->place(at.group, at.line, at.column) : nullptr;
    loops().elements(element_, count(), x, z, y, lower_, upper_);
  }

  const Element element_;
  const float lower_;
  const float upper_;
};

// Windows over the map.
class ImagePoolTask : public PixelTask {
 public:
  ImagePoolTask(const Team& team, const Axis& h, const Axis& w) : PixelTask(team), h_(h), w_(w) {}

  bool accept(const ImageLayout& x) override {
    y_ = {x.images, x.channels, h_.out(), w_.out()};
    return x.height == h_.size && x.width == w_.size;
  }

 protected:
  static Range window(const Axis& axis, int64_t index) {
    const int64_t begin = index * axis.stride - axis.padding;
    return {std::max<int64_t>(0, begin), std::min(axis.size, begin + axis.kernel)};
  }

  // Combines the vectors of a window, of which there is at least one.
  void fold(Element element, const Pixel& at, const float* x, float* y) const {
    const Range lines = window(h_, at.line);
    const Range columns = window(w_, at.column);
    bool is_first = true;
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        const float* from = x + x_.place(at.group, line, column);
        combine(is_first ? Element::kIdentity : element, from, is_first ? nullptr : y, y);
        is_first = false;
      }
    }
  }

  const Axis h_;
  const Axis w_;
};

class ImageMaxPoolTask final : public ImagePoolTask {
 public:
  using ImagePoolTask::ImagePoolTask;

 private:
  void run_pixel(const Pixel& at, const Operands& operands, float* y) const override {
    fold(Element::kLarger, at, operands.x, y);
  }
};

class ImageMeanPoolTask final : public ImagePoolTask {
 public:
  ImageMeanPoolTask(const Team& team, const Axis& h, const Axis& w, bool count_padding)
      : ImagePoolTask(team, h, w), count_padding_(count_padding) {}

 private:
  void run_pixel(const Pixel& at, const Operands& operands, float* y) const override {
    fold(Element::kAdd, at, operands.x, y);
    const auto counted = static_cast<float>(count_of(h_, at.line) * count_of(w_, at.column));
    loops().affine(count(), y, 1.0f / counted, 0.0f, y, -kInfinity, kInfinity);
  }
  int64_t count_of(const Axis& axis, int64_t index) const {
    const Range inside = window(axis, index);
    if (!count_padding_) return inside.end - inside.begin;
    const int64_t begin = index * axis.stride - axis.padding;
    return std::min(axis.size + axis.padding, begin + axis.kernel) - begin;
  }

  const bool count_padding_;
};

// Adds up stretches of pixels and then their sums: one sum over all pixels rounds more often, and
// the errors of networks that end in it were twice torch's.
class ImageMeanTask final : public PixelTask {
 public:
  ImageMeanTask(const Team& team, int64_t area)
      : PixelTask(team),
        area_(area),
        stretch_(static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(area))))) {}

  bool accept(const ImageLayout& x) override {
    y_ = {x.images, x.channels, 1, 1};
    return x.area() == area_;
  }

 private:
  static constexpr int64_t kSums = 16 * kLanes;

  void run_pixel(const Pixel& at, const Operands& operands, float* y) const override {
    std::fill_n(y, count(), 0.0f);
    float sums[kSums];
    for (int64_t done = 0; done < count(); done += kSums) {
      const int64_t floats = std::min(kSums, count() - done);
      for (int64_t begin = 0; begin < area_; begin += stretch_) {
        std::fill_n(sums, floats, 0.0f);
        for (int64_t i = begin; i < std::min(area_, begin + stretch_); ++i) {
          const int64_t place = x_.place(at.group, i / x_.width, i % x_.width);
          add(floats, operands.x + place + done, sums);
        }
        add(floats, sums, y + done);
      }
    }
    loops().affine(count(), y, 1.0f / static_cast<float>(area_), 0.0f, y, -kInfinity, kInfinity);
  }

  static void add(int64_t floats, const float* x, float* y) {
    loops().elements(Element::kAdd, floats, x, y, y, -kInfinity, kInfinity);
  }

  const int64_t area_;
  const int64_t stretch_;
};

// Between torch's layout and images innermost, in blocks of 16 pixels of a channel and group.
class TurnTask final : public Task {
 public:
  TurnTask(const Team& team, const ImageLayout& map, bool to_images)
      : map_(map),
        blocks_((map.area() + kLanes - 1) / kLanes),
        to_images_(to_images),
        parts_(copying_parts(team, map.groups() * blocks_, map.channels * kLanes * kLanes)) {}

  int64_t parts(int64_t) const override { return parts_; }

  void run(int64_t, int64_t part, const Operands& operands) const override {
    if (to_images_) write_zeros(map_, part, parts_, operands.y);
    const Range items = even_range(map_.groups() * blocks_, part, parts_);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t first = item % blocks_ * kLanes;
      const Range pixels{first, std::min(map_.area(), first + kLanes)};
      turn(item / blocks_, pixels, operands);
    }
  }

 private:
  void turn(int64_t group, Range pixels, const Operands& o) const {
    const int64_t first_image = group * kLanes;
    const int64_t lanes = std::min(kLanes, map_.images - first_image);
    const auto width = static_cast<int>(pixels.end - pixels.begin);
    int64_t places[kLanes];
    for (int i = 0; i < width; ++i) {
      const int64_t pixel = pixels.begin + i;
      places[i] = map_.place(group, pixel / map_.width, pixel % map_.width);
    }
    const int64_t image_floats = map_.channels * map_.area();
    for (int64_t c = 0; c < map_.channels; ++c) {
      const int64_t plane = (first_image * map_.channels + c) * map_.area() + pixels.begin;
      for (int i = 0; i < width; ++i) {
        const int64_t vector = places[i] + c * kLanes;
        if (!to_images_) {
          for (int64_t l = 0; l < lanes; ++l) o.y[plane + l * image_floats + i] = o.x[vector + l];
          continue;
        }
        for (int64_t l = 0; l < lanes; ++l) o.y[vector + l] = o.x[plane + l * image_floats + i];
        for (int64_t l = lanes; l < kLanes; ++l) o.y[vector + l] = 0.0f;
      }
    }
  }

  const ImageLayout map_;
  const int64_t blocks_;
  const bool to_images_;
  const int64_t parts_;
};

}  // namespace

ImageTaskPointer make_image_elements(const Team& team, Element element, float lower, float upper) {
  return std::make_unique<ImageElementTask>(team, element, lower, upper);
}

ImageTaskPointer make_image_max_pool(const Team& team, const Axis& h, const Axis& w) {
  return std::make_unique<ImageMaxPoolTask>(team, h, w);
}

ImageTaskPointer make_image_mean_pool(const Team& team, const Axis& h, const Axis& w,
                                      bool count_padding) {
  return std::make_unique<ImageMeanPoolTask>(team, h, w, count_padding);
}

ImageTaskPointer make_image_mean(const Team& team, int64_t area) {
  return std::make_unique<ImageMeanTask>(team, area);
}

TaskPointer make_to_images_task(const Team& team, const ImageLayout& y) {
  return std::make_unique<TurnTask>(team, y, true);
}

TaskPointer make_from_images_task(const Team& team, const ImageLayout& x) {
  return std::make_unique<TurnTask>(team, x, false);
}

}  // namespace sparselt
