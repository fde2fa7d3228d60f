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
      : lines_(lines), share_(slices > 0 ? (lines.rows * lines.lines + slices - 1) / slices : 0) {}

  // A slice's share.
  void fetch() {
    for (int64_t i = 0; i < share_ && lines_.rows > 0; ++i) {
      __builtin_prefetch(lines_.first + line_ * kLineFloats, 0, kIntoL2);
      if (++line_ < lines_.lines) continue;
      line_ = 0;
      lines_.first += lines_.stride;
      --lines_.rows;
    }
  }

 private:
  static constexpr int kIntoL2 = 2;  // as __builtin_prefetch has it
  static constexpr int64_t kLineFloats = 16;

  Lines lines_;
  int64_t share_;
  int64_t line_ = 0;
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
