// SPDX-License-Identifier: Apache-2.0
//
// How the tasks of a program may keep a value between them, where all of them run panels. Knows no
// torch.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <optional>

namespace sparselt {

// A matrix (rows, pixels) as panel kernels read it (kernels.h): vectors of 16 pixels, one after the
// other, each with all rows of it. A row of zeros follows each `period` rows (0: of a layout to be
// chosen, after any number). Torch's layout is (images, rows, pixels / images).
struct PanelLayout {
  static constexpr int64_t kLanes = 16;

  int64_t rows;
  int64_t images;
  int64_t pixels;  // of all images
  int64_t period;

  int64_t periods() const { return (rows + period - 1) / period; }
  int64_t vector_floats() const { return periods() * (period + 1) * kLanes; }
  int64_t floats() const { return (pixels + kLanes - 1) / kLanes * vector_floats(); }
  // With a period where none was chosen: all rows.
  PanelLayout chosen() const {
    return {rows, images, pixels, period == 0 ? std::max<int64_t>(1, rows) : period};
  }
  bool same_matrix(const PanelLayout& other) const {
    return rows == other.rows && images == other.images && pixels == other.pixels;
  }
  bool fits(const PanelLayout& other) const {
    const bool same_period = period == 0 || other.period == 0 || period == other.period;
    return same_matrix(other) && same_period;
  }
  bool operator==(const PanelLayout& other) const {
    return same_matrix(other) && period == other.period;
  }
};

// Of the values of a task; none where a value is laid out as in torch.
struct Layouts {
  std::optional<PanelLayout> x;
  std::optional<PanelLayout> residual;
  std::optional<PanelLayout> y;
};

}  // namespace sparselt
