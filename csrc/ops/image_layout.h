// SPDX-License-Identifier: Apache-2.0
//
// How the tasks of a program may keep the activations of a batch between them: images innermost.
// Knows no torch.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "ops/partition.h"

namespace sparselt {

// A map (images, channels, height, width) as vectors of 16 images, one for each pixel, with all
// channels of that pixel one after the other and a row of zeros behind them. Lanes beyond the last
// image hold anything finite. Every filter position of a convolution then is a whole vector, at a
// distance that is the same for all pixels: nothing is copied, masked or left idle, whatever the
// stride and however small the map. Borders are vectors of zeros: `pad_h` lines before and behind
// the map, the ones behind being those before the next group of images, and `pad_w` vectors before
// each line, which are the ones behind the line before.
struct ImageLayout {
  static constexpr int64_t kLanes = 16;

  int64_t images;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t pad_h = 0;
  int64_t pad_w = 0;

  int64_t groups() const { return (images + kLanes - 1) / kLanes; }
  int64_t area() const { return height * width; }
  int64_t pixels() const { return groups() * area(); }  // vectors that are no border
  int64_t pitch() const { return width + pad_w; }
  int64_t lines() const { return height + pad_h; }
  int64_t vectors() const { return groups() * lines() * pitch() + pad_h * pitch() + pad_w; }
  int64_t vector_floats() const { return (channels + 1) * kLanes; }
  int64_t floats() const { return vectors() * vector_floats(); }
  // Where the vector of a pixel of a group lies, in floats. Pixels outside of the map, by no more
  // than the border, are zeros.
  int64_t place(int64_t group, int64_t line, int64_t column) const {
    return ((group * lines() + line + pad_h) * pitch() + column + pad_w) * vector_floats();
  }
  bool same_map(const ImageLayout& other) const {
    return images == other.images && channels == other.channels && height == other.height &&
           width == other.width;
  }
  bool operator==(const ImageLayout& other) const {
    return same_map(other) && pad_h == other.pad_h && pad_w == other.pad_w;
  }
};

// A place in the order of all pixels: group by group, line by line.
struct Pixel {
  int64_t group;
  int64_t line;
  int64_t column;

  static Pixel of(const ImageLayout& map, int64_t index) {
    return {index / map.area(), index % map.area() / map.width, index % map.width};
  }
  void advance(const ImageLayout& map) {
    if (++column < map.width) return;
    column = 0;
    if (++line < map.height) return;
    line = 0;
    ++group;
  }
};

// Calls run(pixel) for pixels [range.begin, range.end) in order.
template <class Run>
void visit_pixels(const ImageLayout& map, Range range, const Run& run) {
  if (range.begin >= range.end) return;
  Pixel pixel = Pixel::of(map, range.begin);
  for (int64_t i = range.begin; i < range.end; ++i, pixel.advance(map)) run(pixel);
}

// Writes the zeros of a map: its border, and the row behind the channels of each vector. A part's
// share of them, for the parts of a task that write all else.
inline void write_zeros(const ImageLayout& map, int64_t part, int64_t parts, float* y) {
  const int64_t floats = map.vector_floats();
  const int64_t inner = map.groups() * map.lines() * map.pitch();
  const Range share = even_range(map.vectors(), part, parts);
  for (int64_t v = share.begin; v < share.end; ++v) {
    const bool is_border =
        v >= inner || v / map.pitch() % map.lines() < map.pad_h || v % map.pitch() < map.pad_w;
    float* vector = y + v * floats;
    std::fill(is_border ? vector : vector + floats - ImageLayout::kLanes, vector + floats, 0.0f);
  }
}

}  // namespace sparselt
