// SPDX-License-Identifier: Apache-2.0
//
// Packed weights as CPU kernels are given them. Knows no torch.
#pragma once

#include <stdint.h>

namespace sparselt {

// Code for some slices of a block (jit/): adds their products with one vector of the panel to the
// sums of their rows. `x` is the vector's part of x_block, `sums` its sums, by row, `values` the
// chunk's first; `bias` has one a row, and is what the first block's code begins with.
using PanelFunction = void (*)(const float* x, float* sums, const float* values, const float* bias);
struct CodeChunk {
  PanelFunction run;
  int64_t start;  // in bytes, of all chunks
  int64_t bytes;
  int32_t first_slice;
  int32_t last_slice;
};

// The code generated for a weight; empty (all null) where there is none.
struct CodeView {
  const int32_t* block_chunks;  // 2 * num_sections * num_blocks: first and last + 1 chunk of block
                                // b of section s, at 2 * (s * num_blocks + b)
  const CodeChunk* chunks;
  const float* zeros;  // rows: a bias for weights without
};

// Sliced ELL with column blocks (SELL): CSR cut into blocks of `block_cols` columns, within which
// rows are sorted by their number of stored values and grouped into slices of `slice_height`; the
// values of a slice lie step by step, one of each row, short rows filled up with zeros of column
// block_cols, which no x has. Rows are also cut into sections, for threads to share; slices never
// cross them. In its first and last block every row has a slice, in the others only rows with
// values.
//
// BSELL is the same for rows of blocks of slice_height x 1: a slice is such a row, `columns` has
// one column a step, which all its rows share, and no step is filled up. The rows of a slice are
// neighbours; those beyond the last are -1, with values of 0.
//
// The delta format tells a column by a byte, its distance from the one before of its row, at first
// from column 0 of the block. A byte of kJump moves on as far and meets no x; it fills rows up too.
//
// The sign format has no value a step but one magnitude a row. A column stands for a weight of that
// magnitude, and column + block_cols + 1 for one of its negative.
constexpr uint8_t kJump = 255;
struct SellView {
  const int32_t* block_slices;  // num_sections * num_blocks + 1: the first slice of block b of
                                // section s, at s * num_blocks + b
  const int32_t* slice_steps;   // a slice each, + 1: its first step
  const int32_t* slice_rows;    // slice_height a slice: the row, or -1 for none
  const uint16_t* columns;      // slice_height a step (BSELL: one): column within its block
  const float* values;          // slice_height a step; sign: one a row
  int64_t rows;
  int64_t cols;
  int64_t slice_height;
  int64_t block_cols;
  int64_t num_blocks;
  int64_t num_sections;
  CodeView code{};
  bool mirrored = false;            // whether columns find the negative of x too (sign)
  const uint8_t* deltas = nullptr;  // of delta, in place of columns
  bool shared_columns = false;      // whether the rows of a step share its column (BSELL)
};

// The bits format: the stored values of each row in order, and which columns they are of. Bit c %
// 16 of mask (m, c / 16) says whether (m, c) is stored; those of columns beyond the last are 0.
constexpr int64_t kMaskBits = 16;
struct BitsView {
  const int32_t* crow_indices;  // rows + 1: the first value of each row
  const uint16_t* masks;        // rows x ceil(cols / 16)
  const float* values;          // and kMaskBits more, so that 16 may be read from any on
  int64_t rows;
  int64_t cols;
};

// The window format: slices of 16 rows, the longest first, a lane a row. A step meets the 32
// columns from 16 * windows[step] on: in lane i the column columns[step * 16 + i] - 128 of them,
// and nothing where that is 0.
constexpr int64_t kWindowLanes = 16;
constexpr uint8_t kWindowKept = 128;
struct WindowView {
  const int32_t* slice_steps;  // a slice each, + 1: its first step
  const int32_t* slice_rows;   // 16 a slice: the row, or -1 for none
  const uint16_t* windows;     // one a step
  const uint8_t* columns;      // 16 a step
  const float* values;         // 16 a step
  int64_t rows;
  int64_t cols;
};

}  // namespace sparselt
