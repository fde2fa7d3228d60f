// SPDX-License-Identifier: Apache-2.0
//
// A panel as in sell_panel_avx512.cpp, by code that was generated for the weight's pattern
// (jit/panel_code.cpp), for layers with many pixels.
//
// The panel is up to 16 vectors wide, and each block of its x is copied vector by vector: one after
// the other they run through the same chunk of code, which stays in the instruction cache
// meanwhile, while x and sums come from L2. The next chunk is fetched into L2 by then: instruction
// fetch alone draws a third of what loads do from there. After the last block of columns a chunk's
// rows are stored at once, so that stores overlap with the next vector's products. Bound: 1 load a
// stored value and (1 - (1 - d)^31) / (31 d) loads a value at density d, where 1.45 loads and 2
// multiply-adds a cycle could be done; less a load and a store a row and block. Slow where pixels
// are few: the code, 8 to 12 bytes a stored value, is then read once or twice only.
//
// Where there is no code, a loop computes the same sums in the same order.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/panel_avx512.h"

namespace sparselt::cpu {
namespace {

constexpr int kStoredVectors = 4;  // together: a row's stores then fill whole pages' lines in turn

// A vector of the panel has its sums to itself.
int64_t sum_floats(const SellView& weight) { return weight.rows * kLanes; }

// The pieces of each vector of a panel, which come in order.
class PiecesOf {
 public:
  PiecesOf(const PanelRows& rows, int vectors) {
    int i = 0;
    for (int v = 0; v < vectors; ++v) {
      first_[v] = rows.pieces + i;
      while (i < rows.num_pieces && rows.pieces[i].vector == v) ++i;
    }
    first_[vectors] = rows.pieces + i;
  }
  const Piece* begin(int vector) const { return first_[vector]; }

 private:
  const Piece* first_[kMaxVectors + 1];
};

// What a chunk's code does, by loops.
void multiply_slices(const SellView& w, int64_t first_slice, int64_t last_slice, const float* x,
                     float* sums, const float* bias, bool is_first) {
  for (int64_t slice = first_slice; slice < last_slice; ++slice) {
    for (int64_t lane = 0; lane < w.slice_height; ++lane) {
      const int64_t m = w.slice_rows[slice * w.slice_height + lane];
      if (m < 0) continue;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t step = w.slice_steps[slice]; step < w.slice_steps[slice + 1]; ++step) {
        const int64_t place = step * w.slice_height + lane;
        const float* at = x + int64_t{w.columns[place]} * kLanes;
        sum = _mm512_fmadd_ps(_mm512_set1_ps(w.values[place]), _mm512_load_ps(at), sum);
      }
      const __m512 before =
          is_first ? _mm512_set1_ps(bias ? bias[m] : 0.0f) : _mm512_load_ps(sums + m * kLanes);
      _mm512_store_ps(sums + m * kLanes, _mm512_add_ps(before, sum));
    }
  }
}

// Part v of n of a chunk's code, towards L2.
void prefetch_code(const CodeChunk& chunk, int v, int n) {
  const int64_t lines = (chunk.bytes + 63) / 64;
  const auto* code = reinterpret_cast<const char*>(chunk.run);
  for (int64_t line = lines * v / n; line < lines * (v + 1) / n; ++line) {
    _mm_prefetch(code + line * 64, _MM_HINT_T1);
  }
}

class Product {
 public:
  Product(const PanelCall& call, Range sections)
      : call_(call),
        sections_(sections),
        y_pieces_(call.panel.y_rows, call.panel.vectors),
        residual_pieces_(call.panel.residual_rows,
                         call.epilogue.residual ? call.panel.vectors : 0) {}

  void run() {
    const SellView& w = call_.weight;
    for (int64_t block = 0; block < w.num_blocks; ++block) {
      x_ = x_of_block(call_, call_.panel.vectors, block);
      for (int64_t section = sections_.begin; section < sections_.end; ++section) {
        if (w.code.chunks) {
          run_code(section, block);
        } else {
          run_loops(section, block);
        }
      }
    }
  }

 private:
  const float* x_of(int v) const { return x_.vectors[v]; }
  float* sums_of(int v) const { return call_.sums + v * sum_floats(call_.weight); }

  // Called after each vector in turn: stores the last few once they are together.
  void store(int64_t first_slice, int64_t last_slice, int v) const {
    const bool is_last = v + 1 == call_.panel.vectors;
    if (!is_last && (v + 1) % kStoredVectors != 0) return;
    const int first = v / kStoredVectors * kStoredVectors;
    const int32_t* rows = call_.weight.slice_rows;
    const int64_t height = call_.weight.slice_height;
    for (int64_t i = first_slice * height; i < last_slice * height; ++i) {
      if (rows[i] >= 0) store_vectors(rows[i], first, v + 1);
    }
  }

  // Residual, clamp and store of vectors [first, last) of a finished row.
  void store_vectors(int64_t m, int first, int last) const {
    const Panel& panel = call_.panel;
    const __m512 lower = _mm512_set1_ps(call_.epilogue.lower);
    const __m512 upper = _mm512_set1_ps(call_.epilogue.upper);
    if (call_.epilogue.residual) {
      const float* residual = call_.epilogue.residual + place_of_row(panel.residual_rows, m);
      const Piece* end = residual_pieces_.begin(last);
      for (const Piece* piece = residual_pieces_.begin(first); piece < end; ++piece) {
        float* sums = sums_of(piece->vector) + m * kLanes;
        const __m512 sum = _mm512_load_ps(sums);
        const __m512 more = _mm512_maskz_loadu_ps(piece->mask, residual + piece->offset);
        _mm512_store_ps(sums, _mm512_mask_add_ps(sum, piece->mask, sum, more));
      }
    }
    float* y = panel.y + place_of_row(panel.y_rows, m);
    const Piece* end = y_pieces_.begin(last);
    for (const Piece* piece = y_pieces_.begin(first); piece < end; ++piece) {
      const __m512 out = _mm512_load_ps(sums_of(piece->vector) + m * kLanes);
      _mm512_mask_storeu_ps(y + piece->offset, piece->mask, clamp(out, lower, upper));
    }
  }

  void run_code(int64_t section, int64_t block) const {
    const SellView& w = call_.weight;
    const float* bias = call_.epilogue.bias ? call_.epilogue.bias : w.code.zeros;
    const int32_t* range = w.code.block_chunks + 2 * (section * w.num_blocks + block);
    const int32_t all = w.code.block_chunks[2 * w.num_sections * w.num_blocks - 1];
    for (int32_t i = range[0]; i < range[1]; ++i) {
      const CodeChunk& chunk = w.code.chunks[i];
      const CodeChunk& next = w.code.chunks[i + 1 < all ? i + 1 : 0];
      const float* values = w.values + w.slice_steps[chunk.first_slice] * w.slice_height;
      for (int v = 0; v < call_.panel.vectors; ++v) {
        prefetch_code(next, v, call_.panel.vectors);
        chunk.run(x_of(v), sums_of(v), values, bias);
        if (block + 1 == w.num_blocks) store(chunk.first_slice, chunk.last_slice, v);
      }
    }
  }

  void run_loops(int64_t section, int64_t block) const {
    const SellView& w = call_.weight;
    const int32_t* slices = w.block_slices + section * w.num_blocks + block;
    for (int v = 0; v < call_.panel.vectors; ++v) {
      multiply_slices(w, slices[0], slices[1], x_of(v), sums_of(v), call_.epilogue.bias,
                      block == 0);
      if (block + 1 == w.num_blocks) store(slices[0], slices[1], v);
    }
  }

  const PanelCall& call_;
  const Range sections_;
  const PiecesOf y_pieces_;
  const PiecesOf residual_pieces_;
  XBlock x_{};
};

}  // namespace

void sell_code_avx512(const PanelCall& call, Range sections) { Product(call, sections).run(); }

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
