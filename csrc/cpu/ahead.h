// SPDX-License-Identifier: Apache-2.0
//
// Brings the x of panels from afar before it is read. Include after kernels.h.
#pragma once

namespace sparselt::cpu {
namespace {

// Brings lines of x from afar while slices are multiplied: a panel's x is read in no order that
// hardware foresees.
class Ahead {
 public:
  // All of `lines` over so many slices.
  Ahead(const Lines& lines, int64_t slices)
      : row_(lines.first),
        next_(lines.first),
        stride_(lines.stride),
        rows_(lines.rows),
        floats_(lines.lines * kLineFloats),
        share_(slices > 0 ? (lines.rows * lines.lines + slices - 1) / slices * kLineFloats : 0) {}

  // A slice's share: of one row, so that a slice looks at its end once, and perhaps beyond it.
  void fetch() {
    if (rows_ <= 0) return;
    for (int64_t i = 0; i < share_; i += kLineFloats) __builtin_prefetch(next_ + i, 0, kIntoL2);
    next_ += share_;
    if (next_ < row_ + floats_) return;
    row_ += stride_;
    next_ = row_;
    --rows_;
  }

 private:
  static constexpr int kIntoL2 = 2;  // as __builtin_prefetch has it
  static constexpr int64_t kLineFloats = 16;

  const float* row_;
  const float* next_;
  int64_t stride_;
  int64_t rows_;
  int64_t floats_;
  int64_t share_;
};

// What the block after `block` reads of x; after the last one, what the next panel reads first.
inline Lines lines_after(const PanelCall& call, int vectors, int64_t block) {
  const SellView& w = call.weight;
  const Panel& panel = call.panel;
  if (block + 1 == w.num_blocks) return panel.next;
  if (!panel.loads) {
    const int64_t apart = vectors > 1 ? panel.x_places[1] - panel.x_places[0] : 0;
    return {panel.x + (block + 1) * panel.x_block_stride, apart, vectors, w.block_cols};
  }
  if (panel.taps > 1) return {};
  const int64_t first = (block + 1) * w.block_cols;
  const int64_t rows = w.cols - first < w.block_cols ? w.cols - first : w.block_cols;
  return {panel.x + first * panel.channel_stride + panel.loads->offset, panel.channel_stride, rows,
          vectors + 1};
}

}  // namespace
}  // namespace sparselt::cpu
