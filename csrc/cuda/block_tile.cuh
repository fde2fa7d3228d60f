// SPDX-License-Identifier: Apache-2.0
//
// Products with dense blocks: how W gets into shared memory, and the walk over it. The stored
// blocks of a block row are seen as one dense matrix W' (block_rows, depth), and x is gathered to
// match, x' (depth, columns): column t of W' is column t % block_cols of the t / block_cols-th
// block. A block of threads walks t in steps of 128 bytes of a row of W' and keeps kStages steps of
// both in shared memory, copied in the background (block_input.cuh: how x' gets there).
#pragma once

#include "cuda/calls.h"
#include "cuda/device.cuh"

namespace sparselt::cuda {

// Threads that share a tile: as many as keep 128 sums each, and at least 128.
template <int kRows, int kColumns>
constexpr int kTileThreads = kRows * kColumns > 128 * 128 ? 256 : 128;
constexpr int kStages = 3;
constexpr int kRowPieces = 8;  // 16-byte pieces of a row of W' in a step

template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements of a piece
template <class T>
constexpr int kStep = kRowPieces * kPiece<T>;  // columns of W' a step

// A convolution over channels-last maps. A product with x (N, K) is one, with N images of one
// pixel.
struct PixelGeometry {
  int channels, group_channels;
  int height, width;
  int out_height, out_width;
  int kernel_h, kernel_w;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Divisor by_width, by_height;  // of the output
  Divisor by_group;             // block rows
};

// How a launch cuts y into tiles, the innermost first. Divisions by these would otherwise be most
// of what a block of threads does before its first copy.
struct TileGrid {
  Divisor slices;  // of a block row
  Divisor block_rows;
  Divisor column_tiles;
  Divisor batch;
};

// A launch, the same for all blocks of threads.
struct BlockCall {
  Weight weight;
  const void* x;
  void* y;
  float* partial;   // sums of the parts that block rows are cut into, each laid out as y; or null
  int splits;       // parts of a block row's list of blocks
  int64_t columns;  // of y: of one product, or pixels of all images
  int64_t batch;
  int64_t x_row;  // of an x (K, N)
  int64_t x_batch;
  TileGrid grid;
  Divisor by_block_cols;
  Divisor by_splits;
  PixelGeometry pixels;
  Epilogue epilogue;
};

// Prepares a call for tiles of rows x columns, and says how many blocks of threads they are.
inline int64_t fill_grid(BlockCall& call, int64_t rows, int64_t columns) {
  const Weight& w = call.weight;
  const int64_t slices = ceil_div(w.block_rows, rows);
  const int64_t block_rows = ceil_div(w.rows, w.block_rows);
  const int64_t column_tiles = ceil_div(call.columns, columns);
  const int64_t tiles = slices * block_rows * column_tiles * call.batch;
  if (tiles == 0) return 0;
  call.grid = {Divisor(slices), Divisor(block_rows), Divisor(column_tiles), Divisor(call.batch)};
  call.by_block_cols = Divisor(w.block_cols);
  call.by_splits = Divisor(call.splits);
  return tiles * call.splits;
}

// Which tile of y a block of threads owns, and which part of its block row's blocks.
struct BlockPlace {
  int64_t block_row, first_column, batch;
  int first_row;  // in the block row
  int split;
  __device__ BlockPlace(const BlockCall& call, int rows, int columns) {
    int tile = static_cast<int>(blockIdx.x);
    first_row = take(tile, call.grid.slices) * rows;
    block_row = take(tile, call.grid.block_rows);
    first_column = static_cast<int64_t>(take(tile, call.grid.column_tiles)) * columns;
    batch = take(tile, call.grid.batch);
    split = tile;
  }
  // The remainder; the quotient stays.
  static __device__ int take(int& number, const Divisor& by) {
    const int whole = number;
    number = by.quotient(number);
    return whole - number * static_cast<int>(by.divisor);
  }
  __device__ int64_t row(const BlockCall& call) const {
    return block_row * call.weight.block_rows + first_row;
  }
  // Rows of y that the tile really has.
  __device__ int rows(const BlockCall& call, int most) const {
    const int64_t end = min(call.weight.rows, (block_row + 1) * call.weight.block_rows);
    return static_cast<int>(max(int64_t{0}, min(end - row(call), static_cast<int64_t>(most))));
  }
};

// The part of a block row that a block of threads multiplies.
template <class T>
struct BlockRow {
  const T* weights;        // of the first block, from the tile's first row on
  const int32_t* indices;  // of the first block
  int depth;               // of W'
  int rows;                // of the tile that exist in a block
  int block_cols;
  int block_size;
  Divisor by_cols;

  __device__ BlockRow(const BlockCall& call, const BlockPlace& place, int tile_rows)
      : block_cols(static_cast<int>(call.weight.block_cols)),
        block_size(static_cast<int>(call.weight.block_rows * call.weight.block_cols)),
        by_cols(call.by_block_cols) {
    const int32_t* crow = static_cast<const int32_t*>(call.weight.parts[0]) + place.block_row;
    const int first = crow[0];
    const int count = crow[1] - first;
    const int each = call.by_splits.quotient(count);
    const int more = count - each * call.splits;  // so many parts have one block more
    const int64_t begin = first + each * place.split + min(place.split, more);
    depth = (each + (place.split < more)) * block_cols;
    indices = static_cast<const int32_t*>(call.weight.parts[1]) + begin * call.weight.index_size;
    weights = static_cast<const T*>(call.weight.parts[2]) + begin * block_size +
              place.first_row * block_cols;
    rows = min(tile_rows, static_cast<int>(call.weight.block_rows) - place.first_row);
  }
  __device__ int steps() const { return (depth + kStep<T> - 1) / kStep<T>; }
  __device__ int block_of(int t) const { return by_cols.quotient(t); }
};

// Where piece `piece` of row `row` lies in a tile of rows of kPieces pieces, a multiple of 8: eight
// rows' pieces of one column, and eight neighbours in a row, meet all the banks.
template <class T, int kPieces>
__device__ __forceinline__ T* piece_at(T* tile, int row, int piece) {
  return tile + (row * kPieces + (piece ^ (row & 7))) * kPiece<T>;
}

// Fills a piece element by element: those that `exists` denies with zeros.
template <class T, class From, class Exists>
__device__ __forceinline__ void gather_piece(T* to, const From& from, const Exists& exists) {
  Vector<T, kPiece<T>> piece;
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i)
    piece.elements[i] = exists(i) ? *from(i) : from_float<T>(0.0f);
  *reinterpret_cast<Vector<T, kPiece<T>>*>(to) = piece;
}

// Copies step [first, first + kStep) of W' to shared memory, kRows rows. kWide: pieces of W never
// cross a block, and are aligned.
template <class T, int kRows, int kThreads, bool kWide>
__device__ __forceinline__ void stage_weights(T* tile, const BlockRow<T>& row, int first) {
  constexpr int kLines = kThreads / kRowPieces;
  const int piece = static_cast<int>(threadIdx.x) % kRowPieces;
  const int line = static_cast<int>(threadIdx.x) / kRowPieces;
  const int t = first + piece * kPiece<T>;
  if constexpr (kWide) {
    const T* from = row.weights + row.block_of(t) * (row.block_size - row.block_cols) + t +
                    line * row.block_cols;
#pragma unroll
    for (int i = 0; i < kRows; i += kLines) {
      copy_async_16(piece_at<T, kRowPieces>(tile, line + i, piece), from + i * row.block_cols,
                    t < row.depth && line + i < row.rows);
    }
  } else {
#pragma unroll 1
    for (int r = line; r < kRows; r += kLines) {
      const auto from = [&](int i) {
        const int block = row.block_of(t + i);
        return row.weights + block * (row.block_size - row.block_cols) + t + i + r * row.block_cols;
      };
      gather_piece(piece_at<T, kRowPieces>(tile, r, piece), from,
                   [&](int i) { return t + i < row.depth && r < row.rows; });
    }
  }
}

// Calls multiply(weights, inputs) for every step, with its tiles of W' and x' in shared memory.
template <class T, int kRows, class Input, class Multiply>
__device__ __forceinline__ void for_each_step(const BlockRow<T>& row, Input& input,
                                              unsigned char* shared, const Multiply& multiply) {
  constexpr int kWeightBytes = kRows * kRowPieces * 16;
  constexpr int kStageBytes = kWeightBytes + Input::kBytes;
  const int steps = row.steps();
  const auto stage = [&](int step, unsigned char* memory) {
    if (step < steps) {
      input.stage(reinterpret_cast<T*>(memory + kWeightBytes), row, step * kStep<T>);
      stage_weights<T, kRows, Input::kThreads, Input::kWide>(reinterpret_cast<T*>(memory), row,
                                                             step * kStep<T>);
    }
    copy_commit();
  };
  input.look_ahead(row, 0);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) stage(step, shared + step * kStageBytes);
  unsigned char* full = shared;
  unsigned char* empty = shared + (kStages - 1) * kStageBytes;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all, and nobody reads the step before any more
    stage(step + kStages - 1, empty);
    multiply(reinterpret_cast<const T*>(full), reinterpret_cast<const T*>(full + kWeightBytes));
    empty = full;
    full += kStageBytes;
    if (full == shared + kStages * kStageBytes) full = shared;
  }
  copy_wait<0>();
  __syncthreads();  // the stages' memory is free
}

template <int kRows, class Input>
constexpr int kStageMemory = kStages * (kRows * kRowPieces * 16 + Input::kBytes);

}  // namespace sparselt::cuda
