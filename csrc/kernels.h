// SPDX-License-Identifier: Apache-2.0
//
// What a CPU kernel is given and must do. Kernels know neither torch nor threads: they get raw
// pointers that the layer above has checked, and half-open ranges of the output that they alone
// own. Every element of a result is summed in the order of the stored values of its row, whatever
// the ranges, so results are bitwise the same for any split.
#pragma once

#include <stdint.h>

#include "sliced_views.h"

namespace sparselt {

// Half-open: begin <= i < end.
struct Range {
  int64_t begin;
  int64_t end;
};

// A weight matrix of `rows` x `cols` in stored blocks of block_rows x block_cols (1 x 1 for CSR).
// Blocks of the last block row or column may stick out of the matrix; what sticks out is stored as
// zeros and belongs to no element of x or y.
struct SparseView {
  const int32_t* crow_indices;  // ceil(rows / block_rows) + 1, nondecreasing, starts at 0
  const int32_t* col_indices;   // a block column each, ascending within a block row
  const float* values;          // block_rows * block_cols a block, row-major
  int64_t rows;
  int64_t cols;
  int64_t block_rows;
  int64_t block_cols;
};

// y = clamp(W x + bias + residual, lower, upper). The clamp is always there: plain infinities when
// unused.
struct Epilogue {
  const float* bias;      // one a row, or null
  const float* residual;  // laid out as y (panels have it say how), or null
  float lower;
  float upper;
};

// y[m, n] for a row-major x (cols x columns) and y (rows x columns).
struct SpmmCall {
  SparseView weight;
  const float* x;
  int64_t x_stride;  // floats from a row of x to the next
  float* y;
  int64_t y_stride;
  int64_t columns;  // of the whole product: what a kernel may choose its method by, without
                    // breaking bitwise equality
  Epilogue epilogue;
};

// A convolution as a product with shifted planes: column k of the weight meets the plane that
// starts at x + column_offsets[k], and flat pixel j of that plane. Output pixel (p, q) is the flat
// pixel p * pitch + q; flat pixels with j % pitch >= out_width are no outputs. ops/conv2d.cpp lays
// x out so that this holds for any stride, padding and dilation.
struct Conv2dCall {
  SparseView weight;  // every row, of all groups
  const float* x;     // the planes of the group that the rows belong to
  const int32_t* column_offsets;
  int64_t pitch;
  int64_t out_width;
  float* y;          // the image's first output plane
  int64_t y_stride;  // floats from an output plane to the next
  Epilogue epilogue;
};

// Lines of x that a band kernel copies before it reads them: line i of channel c, `width` floats
// from from + c * from_stride + (first + i) * width on, goes to to + c * to_stride + i * pitch.
// Lines outside of [0, height) are zeros.
struct LineCopy {
  const float* from;  // null where there is nothing to copy
  int64_t from_stride;
  int64_t first;
  int64_t height;
  int64_t width;
  float* to;
  int64_t to_stride;
  int64_t pitch;
  int64_t channels;
  int64_t lines;
};

// Some output lines of a convolution: y is the place of line 0, and x holds what the lines meet
// once they are copied. Pixels beyond the end of a line are not read.
struct BandCall {
  LineCopy copy;
  Conv2dCall product;
};

// Lanes of a panel's vector of 16: the lanes in `mask` lie at base + offset + lane.
struct Piece {
  int32_t offset;
  uint16_t vector;
  uint16_t mask;
};

// Where the rows of a panel's result lie: the lanes of row m at (m + m / period) * stride plus its
// pieces.
struct PanelRows {
  int64_t stride;
  uint32_t period;
  const Piece* pieces;
  int num_pieces;
};

// Memory: `lines` of 64 bytes in each of `rows` rows, `stride` floats from a row to the next.
struct Lines {
  const float* first;
  int64_t stride;
  int64_t rows;
  int64_t lines;
};

// What a panel of up to kMaxPanelVectors * 16 output columns (or pixels) reads and writes. Column k
// of the weight is tap k % taps of channel k / taps, and meets the values at x + (k / taps) *
// channel_stride plus the tap's pieces; lanes in no piece are zero (padding, or beyond the last
// column). Where `loads` is null, x is read where it lies: column c of block b of vector v is the
// 16 floats at x + x_places[v] + b * x_block_stride + c * 16, aligned to 64 bytes, and the column
// that short rows are filled up with is zeros. ops/panels.h and ops/image_panels.h make these.
struct Panel {
  const float* x;
  int64_t channel_stride;
  int64_t taps;
  int vectors;
  const Piece* loads;        // `vectors` pieces a tap, one for each vector in order
  const Piece* extra_loads;  // further pieces of vectors that one piece does not cover
  const int32_t* tap_extra;  // taps + 1: the tap's first extra piece
  const int64_t* x_places;   // in floats; one a vector
  int64_t x_block_stride;
  float* y;
  PanelRows y_rows;
  PanelRows residual_rows;  // of epilogue.residual
  Lines next;               // what the next panel reads of x first, for a cache to have it by then
};

struct PanelCall {
  SellView weight;
  Panel panel;
  Epilogue epilogue;
  float* x_block;  // scratch of (block_cols + 1) * vectors * 16 floats, for a copy of x
  float* sums;     // scratch of rows * vectors * 16 floats, like that one aligned to 64 bytes
};

// A product with up to kMaxSpmvColumns columns, for which no panel is worth its width. x is laid
// out by the blocks of the weight: column c of block b meets the `lanes` floats at x + b *
// block_stride + c * lanes. Lanes from `columns` on are zeros, and so are all of c = block_cols,
// what short rows are filled up with. For the sign format the negative of each block follows it, so
// that its columns find it. ops/spmv.cpp makes this.
//
// For the formats bits and window a view of theirs stands in place of `weight`, and column n of x
// is contiguous, from x + n * block_stride on, with zeros up to a multiple of 16 and 16 more behind
// it; `lanes` says nothing. ops/spmv_columns.cpp makes this.
constexpr int64_t kMaxSpmvColumns = 16;
struct SpmvCall {
  SellView weight;
  const float* x;  // aligned to 64 bytes
  int64_t block_stride;
  int64_t lanes;    // 1, 4, 8 or 16; at most the kernel's tile_columns
  int64_t columns;  // 1 where lanes is 1
  float* y;  // holds sums between blocks; y[m, n] is at m * y_row_stride + n * y_column_stride
  int64_t y_row_stride;  // 1 where lanes is 1
  int64_t y_column_stride;
  Epilogue epilogue;
  BitsView bits{};
  WindowView window{};
};

// One direction of a window that slides over an image.
struct WindowAxis {
  int64_t size;  // of x
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
  int64_t out;
};

// A depthwise convolution, of dense weights: plane i of y is channel i / multiplier of x, counted
// over all images, under the taps of filter i % filters.
constexpr int64_t kMaxDepthwiseTaps = 32;
struct DepthwiseCall {
  const float* x;       // (batch, filters / multiplier, h.size, w.size)
  const float* weight;  // (filters, h.kernel, w.kernel); w.kernel is at most kMaxDepthwiseTaps
  int64_t filters;
  int64_t multiplier;
  WindowAxis h;
  WindowAxis w;
  float* y;  // (batch, filters, h.out, w.out)
  Epilogue epilogue;
};

// `rows` counts stored (block) rows; `columns` matrix columns; `pixels` flat pixels as above;
// `lines` output lines; `sections` those of SELL, rows of bits, slices of windows; `planes`
// channels of all images.
using PanelKernel = void (*)(const PanelCall& call, Range sections);
using SpmvKernel = void (*)(const SpmvCall& call, Range sections);
using SpmmKernel = void (*)(const SpmmCall& call, Range rows, Range columns);
using Conv2dKernel = void (*)(const Conv2dCall& call, Range rows, Range pixels);
using BandKernel = void (*)(const BandCall& call, Range rows, Range lines);
using DepthwiseKernel = void (*)(const DepthwiseCall& call, Range planes);

#define KERNEL_SIGNATURE_panel const PanelCall &call, Range sections
#define KERNEL_SIGNATURE_code const PanelCall &call, Range sections
#define KERNEL_SIGNATURE_spmv const SpmvCall &call, Range sections
#define KERNEL_SIGNATURE_depthwise const DepthwiseCall &call, Range planes
#define KERNEL_SIGNATURE_band const BandCall &call, Range rows, Range lines
#define KERNEL_SIGNATURE_spmm const SpmmCall &call, Range rows, Range columns
#define KERNEL_SIGNATURE_conv2d const Conv2dCall &call, Range rows, Range pixels
#define KERNEL_DECLARE_cpu(name, op) void name(KERNEL_SIGNATURE_##op);
#define KERNEL_DECLARE_cuda(name, op)
#define KERNEL(name, op, format, device, ...) KERNEL_DECLARE_##device(name, op)
namespace cpu {
#include "kernels.inc"
}  // namespace cpu
#undef KERNEL
#undef KERNEL_DECLARE_cuda
#undef KERNEL_DECLARE_cpu
#undef KERNEL_SIGNATURE_conv2d
#undef KERNEL_SIGNATURE_spmm
#undef KERNEL_SIGNATURE_band
#undef KERNEL_SIGNATURE_depthwise
#undef KERNEL_SIGNATURE_spmv
#undef KERNEL_SIGNATURE_code
#undef KERNEL_SIGNATURE_panel

}  // namespace sparselt
