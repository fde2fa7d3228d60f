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

namespace sparselt::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kMaxVectors = 16;
constexpr int kStoredVectors = 4;  // together: a row's stores then fill whole pages' lines in turn
constexpr __mmask16 kAllLanes = 0xffff;

// A vector of the panel has its x_block to itself, with a row of zeros at the end, and its sums.
int64_t block_floats(const SellView& weight) { return (weight.block_cols + 1) * kLanes; }
int64_t sum_floats(const SellView& weight) { return weight.rows * kLanes; }

// Rows [first, last) of x for this panel into the scratch.
void load_block(const PanelCall& call, int64_t first, int64_t last) {
  const Panel& panel = call.panel;
  const int64_t stride = block_floats(call.weight);
  int64_t tap = first % panel.taps;
  const float* base = panel.x + first / panel.taps * panel.channel_stride;
  float* to = call.x_block;
  for (int64_t k = first; k < last; ++k, to += kLanes) {
    const Piece* pieces = panel.loads + tap * panel.vectors;
    for (int v = 0; v < panel.vectors; ++v) {
      _mm512_store_ps(to + v * stride,
                      _mm512_maskz_loadu_ps(pieces[v].mask, base + pieces[v].offset));
    }
    for (int32_t e = panel.tap_extra[tap]; e < panel.tap_extra[tap + 1]; ++e) {
      const Piece& piece = panel.extra_loads[e];
      float* at = to + piece.vector * stride;
      _mm512_store_ps(at,
                      _mm512_mask_loadu_ps(_mm512_load_ps(at), piece.mask, base + piece.offset));
    }
    if (++tap == panel.taps) {
      tap = 0;
      base += panel.channel_stride;
    }
  }
}

// The second operand of max and min is the one that survives a NaN. (The masks are full: the plain
// forms make GCC 12 warn of a register it leaves undefined on purpose.)
inline __m512 clamp(__m512 sum, __m512 lower, __m512 upper) {
  return _mm512_maskz_min_ps(kAllLanes, upper, _mm512_maskz_max_ps(kAllLanes, lower, sum));
}

// Residual, clamp and store of the finished rows of some slices, for the vectors of some stores.
void store_rows(const PanelCall& call, int64_t first_slice, int64_t last_slice, const Piece* stores,
                const Piece* stores_end) {
  const Panel& panel = call.panel;
  const __m512 lower = _mm512_set1_ps(call.epilogue.lower);
  const __m512 upper = _mm512_set1_ps(call.epilogue.upper);
  const int32_t* rows = call.weight.slice_rows;
  const int64_t height = call.weight.slice_height;
  for (int64_t i = first_slice * height; i < last_slice * height; ++i) {
    const int64_t m = rows[i];
    if (m < 0) continue;
    const int64_t row = m * panel.y_stride;
    for (const Piece* piece = stores; piece < stores_end; ++piece) {
      const float* sums = call.sums + piece->vector * sum_floats(call.weight);
      __m512 out = _mm512_load_ps(sums + m * kLanes);
      if (call.epilogue.residual) {
        const float* residual = call.epilogue.residual + row + piece->offset;
        out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(piece->mask, residual));
      }
      _mm512_mask_storeu_ps(panel.y + row + piece->offset, piece->mask, clamp(out, lower, upper));
    }
  }
}

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
  Product(const PanelCall& call, Range sections) : call_(call), sections_(sections) {
    const Panel& panel = call.panel;
    int i = 0;
    for (int v = 0; v < panel.vectors; ++v) {
      stores_[v] = panel.stores + i;
      while (i < panel.num_stores && panel.stores[i].vector == v) ++i;
    }
    stores_[panel.vectors] = panel.stores + i;
  }

  void run() {
    const SellView& w = call_.weight;
    // What a filled-up row multiplies its zeros with: any other x could be infinite.
    for (int v = 0; v < call_.panel.vectors; ++v) {
      _mm512_store_ps(x_of(v) + w.block_cols * kLanes, _mm512_setzero_ps());
    }
    for (int64_t block = 0; block < w.num_blocks; ++block) {
      const int64_t first = block * w.block_cols;
      const int64_t last = first + w.block_cols < w.cols ? first + w.block_cols : w.cols;
      load_block(call_, first, last);
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
  float* x_of(int v) const { return call_.x_block + v * block_floats(call_.weight); }
  float* sums_of(int v) const { return call_.sums + v * sum_floats(call_.weight); }

  // Called after each vector in turn: stores the last few once they are together.
  void store(int64_t first_slice, int64_t last_slice, int v) const {
    const bool is_last = v + 1 == call_.panel.vectors;
    if (!is_last && (v + 1) % kStoredVectors != 0) return;
    const int first = v / kStoredVectors * kStoredVectors;
    store_rows(call_, first_slice, last_slice, stores_[first], stores_[v + 1]);
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
  const Piece* stores_[kMaxVectors + 1];
};

}  // namespace

void sell_code_avx512(const PanelCall& call, Range sections) { Product(call, sections).run(); }

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
