// SPDX-License-Identifier: Apache-2.0
//
// How x' (block_tile.cuh) gets into shared memory, from two layouts of x:
//   MatrixInput   x (K, N): rows of x' are kept, kColumns elements each
//   PixelInput    x (B, H, W, C): an output pixel is a column of x', and an element of it is a
//                 channel under a tap (r, s) of the filter. Kept by pixels, whose channels lie
//                 together, or turned into rows of x' (float32, for which there is no ldmatrix).
//                 Where a tap leaves the map it finds zeros: each pixel has a bit for each r and
//                 each s that stay inside.
// An Input offers
//   kThreads               that take part
//   kBytes                 of one step in shared memory
//   kByPixels              how it is kept there
//   kWide                  whether W and x come in aligned 16-byte pieces; if not, each element is
//                          looked up
//   look_ahead(row, t)     fetches what stage() will need to know for the step at t
//   stage(tile, row, t)    starts the copies of the step at t, and looks ahead to the next one
#pragma once

#include "cuda/block_tile.cuh"

namespace sparselt::cuda {

template <class T, int kColumns, int kTeam, bool kPieces16>
struct MatrixInput {
  static constexpr int kThreads = kTeam;
  static constexpr bool kWide = kPieces16;
  static constexpr bool kByPixels = false;
  static constexpr int kPieces = kColumns / kPiece<T>;  // of a row
  static constexpr int kLines = kThreads / kPieces;
  static constexpr int kBytes = kStep<T> * kColumns * static_cast<int>(sizeof(T));

  const T* x;  // x[0, first column of the tile]
  int64_t x_row;
  int cols;     // K
  int columns;  // of the tile that exist

  __device__ MatrixInput(const BlockCall& call, const BlockPlace& place, unsigned char*)
      : x(static_cast<const T*>(call.x) + place.batch * call.x_batch + place.first_column),
        x_row(call.x_row),
        cols(static_cast<int>(call.weight.cols)),
        columns(static_cast<int>(
            min(call.columns - place.first_column, static_cast<int64_t>(kColumns)))) {}

  static constexpr int table_bytes(const BlockCall&) { return 0; }
  __device__ void look_ahead(const BlockRow<T>&, int) {}

  __device__ void stage(T* tile, const BlockRow<T>& row, int first) const {
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    const int line = static_cast<int>(threadIdx.x) / kPieces;
    const int column = piece * kPiece<T>;
#pragma unroll
    for (int i = 0; i < kStep<T>; i += kLines) {
      const int t = first + i + line;
      int k = cols;
      if (t < row.depth) {
        const int block = row.block_of(t);
        k = __ldg(row.indices + block) * row.block_cols + t - block * row.block_cols;
      }
      T* to = piece_at<T, kPieces>(tile, i + line, piece);
      const T* from = x + k * x_row + column;
      if constexpr (kWide) {
        copy_async_16(to, from, k < cols && column < columns);
      } else {
        gather_piece(
            to, [&](int j) { return from + j; },
            [&](int j) { return k < cols && column + j < columns; });
      }
    }
  }
};

// Where a pixel's patch begins, from the tile's first pixel on, and which taps lie on the map: bit
// r and bit 16 + s.
struct PixelPlace {
  int offset;
  uint32_t inside;
};
struct Tap {
  int offset;
  uint32_t bits;
};
// An image and the place in it where an output pixel's patch begins.
struct OutputPixel {
  int image, h, w;
  __device__ OutputPixel(const PixelGeometry& g, int pixel) {
    const int row = g.by_width.quotient(pixel);
    image = g.by_height.quotient(row);
    h = (row - image * g.out_height) * g.stride_h - g.padding_h;
    w = (pixel - row * g.out_width) * g.stride_w - g.padding_w;
  }
  __device__ int64_t patch(const PixelGeometry& g) const {
    return ((static_cast<int64_t>(image) * g.height + h) * g.width + w) * g.channels;
  }
};
constexpr int kMostTaps = 15;            // along a side; bits 15 and 31 stay free, for
constexpr uint32_t kNowhere = 1u << 31;  // what no pixel has inside

template <class T, int kColumns, int kTeam, bool kTurned, bool kPieces16>
struct PixelInput {
  static constexpr int kThreads = kTeam;
  static constexpr bool kWide = kPieces16;
  static constexpr bool kByPixels = !kTurned;
  static constexpr int kPieces = kTurned ? kColumns / kPiece<T> : kRowPieces;
  static constexpr int kBytes = kStep<T> * kColumns * static_cast<int>(sizeof(T));

  const T* x;  // the first channel of the group, where the tile's first pixel has its patch
  const PixelPlace* places;
  const Tap* taps;
  int group_channels;
  bool pairs;       // an index is a tap and a block of channels
  int tap = 0;      // of the piece that this thread copies next
  int channel = 0;  // its block of channels

  __device__ PixelInput(const BlockCall& call, const BlockPlace& place, unsigned char* tables)
      : group_channels(call.pixels.group_channels), pairs(call.weight.index_size == 2) {
    const PixelGeometry& g = call.pixels;
    const int first = static_cast<int>(place.first_column);
    const int64_t start = OutputPixel(g, first).patch(g);
    const int group = g.by_group.quotient(static_cast<int>(place.block_row));
    x = static_cast<const T*>(call.x) + start + group * g.group_channels;

    auto* pixel_places = reinterpret_cast<PixelPlace*>(tables);
    for (int i = static_cast<int>(threadIdx.x); i < kColumns; i += kThreads) {
      PixelPlace found{0, 0};
      if (first + i < call.columns) {
        const OutputPixel pixel(g, first + i);
        found.offset = static_cast<int>(pixel.patch(g) - start);
        for (int r = 0; r < g.kernel_h; ++r) {
          const int at = pixel.h + r * g.dilation_h;
          if (at >= 0 && at < g.height) found.inside |= 1u << r;
        }
        for (int s = 0; s < g.kernel_w; ++s) {
          const int at = pixel.w + s * g.dilation_w;
          if (at >= 0 && at < g.width) found.inside |= 1u << (16 + s);
        }
      }
      pixel_places[i] = found;
    }
    auto* tap_places = reinterpret_cast<Tap*>(pixel_places + kColumns);
    for (int i = static_cast<int>(threadIdx.x); i < g.kernel_h * g.kernel_w; i += kThreads) {
      const int r = i / g.kernel_w;
      const int s = i % g.kernel_w;
      tap_places[i] = {(r * g.dilation_h * g.width + s * g.dilation_w) * g.channels,
                       1u << r | 1u << (16 + s)};
    }
    places = pixel_places;
    taps = tap_places;
    __syncthreads();
  }

  static constexpr int table_bytes(const BlockCall& call) {
    return (kColumns + call.pixels.kernel_h * call.pixels.kernel_w) *
           static_cast<int>(sizeof(PixelPlace));
  }

  // The column of a step that this thread copies (its first one, where a piece is copied).
  static __device__ int my_column() {
    const int thread = static_cast<int>(threadIdx.x);
    return kTurned ? thread / kWarpSize * 8 + thread % 8 : thread % kRowPieces * kPiece<T>;
  }

  __device__ void look_ahead(const BlockRow<T>& row, int first) {
    const int t = first + my_column();
    if (t >= row.depth) return;
    look_up(row, row.block_of(t));
  }
  __device__ void look_up(const BlockRow<T>& row, int block) {
    if (pairs) {
      tap = __ldg(row.indices + 2 * block);
      channel = __ldg(row.indices + 2 * block + 1);
    } else {
      channel = __ldg(row.indices + block);
    }
  }

  // Where column t of W' is read, from a pixel's place on; nowhere if it does not exist.
  __device__ Tap source(const BlockRow<T>& row, int t) const {
    const int c = (channel - row.block_of(t)) * row.block_cols + t;
    if (t >= row.depth || c >= group_channels) return {0, kNowhere};
    return {taps[tap].offset + c, taps[tap].bits};
  }
  static __device__ bool reaches(const PixelPlace& place, const Tap& from) {
    return (place.inside & from.bits) == from.bits;
  }

  __device__ void stage(T* tile, const BlockRow<T>& row, int first) {
    const int t = first + my_column();
    if constexpr (kTurned) {
      stage_turned(tile, source(row, t));
    } else if constexpr (kWide) {
      stage_wide(tile, source(row, t));
    } else {
      stage_each(tile, row, t);
    }
    look_ahead(row, first + kStep<T>);
  }

  __device__ void stage_wide(T* tile, const Tap& from) const {
    const int piece = static_cast<int>(threadIdx.x) % kRowPieces;
    const int line = static_cast<int>(threadIdx.x) / kRowPieces;
#pragma unroll
    for (int i = 0; i < kColumns; i += kThreads / kRowPieces) {
      const PixelPlace place = places[line + i];
      copy_async_16(piece_at<T, kPieces>(tile, line + i, piece), x + from.offset + place.offset,
                    reaches(place, from));
    }
  }

  // For channels that do not come in pieces: each element is looked up.
  __device__ void stage_each(T* tile, const BlockRow<T>& row, int t) {
    const int piece = static_cast<int>(threadIdx.x) % kRowPieces;
    Tap from[kPiece<T>];
#pragma unroll
    for (int i = 0; i < kPiece<T>; ++i) {
      if (t + i < row.depth) look_up(row, row.block_of(t + i));
      from[i] = source(row, t + i);
    }
#pragma unroll 1
    for (int line = static_cast<int>(threadIdx.x) / kRowPieces; line < kColumns;
         line += kThreads / kRowPieces) {
      const PixelPlace place = places[line];
      gather_piece(
          piece_at<T, kPieces>(tile, line, piece),
          [&](int i) { return x + from[i].offset + place.offset; },
          [&](int i) { return reaches(place, from[i]); });
    }
  }

  // A warp copies patches of 8 columns of W' by 4 pixels: whole 32-byte sectors on the way in, all
  // banks on the way out.
  __device__ void stage_turned(T* tile, const Tap& from) const {
    static_assert(!kTurned || (sizeof(T) == 4 && kStep<T> == kThreads / kWarpSize * 8));
    const int line = my_column();
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 8
    for (int i = lane / 8; i < kColumns; i += 4) {
      const PixelPlace place = places[i];
      copy_async_4(piece_at<T, kPieces>(tile, line, i / 4) + i % 4, x + from.offset + place.offset,
                   reaches(place, from));
    }
  }
};

}  // namespace sparselt::cuda
