// SPDX-License-Identifier: Apache-2.0
//
// Convolution by a conv2d kernel. x is laid out so that a convolution of any stride, padding and
// dilation becomes a product with shifted planes (kernels.h): padded with zeros, and cut into
// stride_h x stride_w phases so that the pixels that one tap meets lie next to each other. With a
// stride of 1 there is one phase, whose rows can share their halo: the zeros right of a row are the
// zeros left of the next. Where nothing is padded or cut, x is used as it is.
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "ops/conv_problem.h"
#include "ops/partition.h"

namespace sparselt {
namespace {

class ConvPlaneTask final : public Task {
 public:
  ConvPlaneTask(const Team& team, const ConvProblem& problem, const Weight& weight,
                const Epilogue& epilogue)
      : problem_(problem),
        weight_(weight),
        epilogue_(epilogue),
        planes_(problem.batch * problem.channels_in),
        laying_parts_(copying_parts(team, planes_, problem.geometry.plane())),
        group_channels_(problem.channels_in / problem.groups),
        offsets_(column_offsets(problem.geometry, group_channels_)),
        split_(team, weight.view, problem.batch * problem.groups, problem.geometry.flat_pixels(),
               weight.kernel->tile_columns) {}

  int64_t stages() const override { return in_place() ? 1 : 2; }
  int64_t parts(int64_t stage) const override {
    return stage + 1 < stages() ? laying_parts_ : split_.parts();
  }
  int64_t shared_floats() const override {
    return in_place() ? 0 : planes_ * problem_.geometry.plane();
  }

  void run(int64_t stage, int64_t part, const Operands& operands) const override {
    const Geometry& g = problem_.geometry;
    if (stage + 1 < stages()) {
      const Range planes = even_range(planes_, part, laying_parts_);
      for (int64_t i = planes.begin; i < planes.end; ++i) {
        lay_out_plane(g, operands.x + i * g.h.size * g.w.size, operands.shared + i * g.plane());
      }
      return;
    }
    const float* x = in_place() ? operands.x : operands.shared;
    const int64_t group_rows = problem_.channels_out / problem_.groups;
    const int64_t out_plane = g.h.out() * g.w.out();
    const auto rows_of = [&](int64_t item) {
      const int64_t group = item % problem_.groups;
      return Range{group * group_rows, (group + 1) * group_rows};
    };
    split_.visit(weight_.view, part, rows_of, [&](int64_t item, Range rows, Range pixels) {
      const int64_t image = item / problem_.groups * problem_.channels_out * out_plane;
      Conv2dCall call{weight_.view,    x + item * group_channels_ * g.plane(),
                      offsets_.data(), g.pitch(),
                      g.w.out(),       operands.y + image,
                      out_plane,       epilogue_};
      if (operands.residual) call.epilogue.residual = operands.residual + image;
      weight_.kernel->conv2d(call, rows, pixels);
    });
  }

 private:
  bool in_place() const { return problem_.geometry.in_place(); }

  const ConvProblem problem_;
  const Weight weight_;
  const Epilogue epilogue_;
  const int64_t planes_;
  const int64_t laying_parts_;
  const int64_t group_channels_;
  const std::vector<int32_t> offsets_;
  const ProductSplit split_;
};

}  // namespace

TaskPointer make_conv_planes(const Team& team, const ConvProblem& problem, const Weight& weight,
                             const Epilogue& epilogue) {
  STD_TORCH_CHECK(problem.channels_in / problem.groups * problem.geometry.plane() <=
                      std::numeric_limits<int32_t>::max(),
                  "x: the channels of a group hold more than 2^31 floats; split the image");
  return std::make_unique<ConvPlaneTask>(team, problem, weight, epilogue);
}

}  // namespace sparselt
