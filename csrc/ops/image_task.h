// SPDX-License-Identifier: Apache-2.0
//
// A task whose values lie with images innermost. Knows no torch.
#pragma once

#include <memory>
#include <optional>

#include "ops/image_layout.h"
#include "ops/task.h"

namespace sparselt {

class ImageTask : public Task {
 public:
  // The map that x is, with the border that the task needs; none where any map will do, but is no
  // reason to bring x into this layout.
  virtual std::optional<ImageLayout> own_map() const { return {}; }
  // Whether x may be this map; if so, it is from now on.
  virtual bool accept(const ImageLayout& x) = 0;
  // What y then is, and the residual.
  virtual ImageLayout y_map() const = 0;
  // Whether it can read x with this border.
  virtual bool can_read(const ImageLayout&) const { return true; }
  // Says how the values of each run lie; before anything of a run is asked.
  virtual void lay_out_maps(const ImageLayout& x, const std::optional<ImageLayout>& residual,
                            const ImageLayout& y) = 0;
};

using ImageTaskPointer = std::unique_ptr<ImageTask>;

}  // namespace sparselt
