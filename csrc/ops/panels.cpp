// SPDX-License-Identifier: Apache-2.0
#include "ops/panels.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

#include "ops/partition.h"

namespace sparselt {
namespace {

// Flat pixels and sections that one thread computes.
struct Share {
  Range pixels;
  Range sections;
};

Share share_of(int64_t part, int64_t parts, int64_t pixels, int64_t sections) {
  const int64_t vectors = (pixels + kPanelLanes - 1) / kPanelLanes;
  if (vectors >= parts * kMaxPanelVectors || sections < parts) {
    return {even_columns(pixels, part, parts), {0, sections}};
  }
  return {{0, pixels}, {sections * part / parts, sections * (part + 1) / parts}};
}

void run_share(const Weight& weight, const PanelSource& source, float* y, const Epilogue& epilogue,
               const Share& share, float* scratch) {
  PanelMaker maker(source, weight.rows);
  const int64_t area = source.out_height * source.out_width;
  const int64_t vectors = (share.pixels.end - share.pixels.begin + kPanelLanes - 1) / kPanelLanes;
  const int64_t max_vectors = weight.kernel->tile_columns / kPanelLanes;
  const int64_t panels = (vectors + max_vectors - 1) / max_vectors;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t begin = share.pixels.begin + vectors * i / panels * kPanelLanes;
    const int64_t end =
        std::min(share.pixels.end, share.pixels.begin + vectors * (i + 1) / panels * kPanelLanes);
    int64_t image = 0;
    PanelCall call{weight.sell, maker.make(begin, end, y, &image), epilogue, scratch,
                   scratch + (weight.sell.block_cols + 1) * kMaxPanelLanes};
    if (epilogue.residual) call.epilogue.residual += image * weight.rows * area;
    weight.kernel->panel(call, share.sections);
  }
}

}  // namespace

void run_panels(const Weight& weight, const PanelSource& source, float* y,
                const Epilogue& epilogue) {
  const int64_t pixels = source.batch * source.out_height * source.out_width;
  if (pixels == 0 || weight.rows == 0) return;
  STD_TORCH_CHECK(
      kMaxPanelLanes * std::max(source.image_stride, weight.rows * pixels / source.batch) <
          std::numeric_limits<int32_t>::max(),
      "x: images of this size need more than 32-bit offsets; split them");
  const int64_t stored =
      weight.sell.slice_height *
      weight.sell
          .slice_steps[weight.sell.block_slices[weight.sell.num_sections * weight.sell.num_blocks]];
  const int64_t threads =
      stored * pixels < kSerialWork ? 1 : int64_t{torch::stable::get_num_threads()};
  const int64_t scratch_floats = (weight.sell.block_cols + 1 + weight.rows) * kMaxPanelLanes;
  const Tensor scratch = new_output({threads, scratch_floats});
  float* data = float_data(scratch);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Share share = share_of(part, threads, pixels, weight.sell.num_sections);
      run_share(weight, source, y, epilogue, share, data + part * scratch_floats);
    }
  };
  if (threads == 1) return run(0, 1);
  torch::stable::parallel_for(0, threads, 1, run);
}

}  // namespace sparselt
