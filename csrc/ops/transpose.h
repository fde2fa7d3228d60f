// SPDX-License-Identifier: Apache-2.0
//
// Between torch's layout of a linear layer's values, (batch, features), and the one that products
// want. Knows no torch.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "ops/panel_layout.h"
#include "ops/partition.h"

namespace sparselt {
namespace transpose {

constexpr int64_t kBlock = 16;  // rows and columns of a block: 16 cache lines in, 16 out

// Where the elements of a matrix (features, batch) lie: as in memory, or in panels.
class Places {
 public:
  Places(int64_t features, int64_t batch)
      : floats_(features * batch),
        vector_(kBlock),
        row_(batch),
        period_(std::max<int64_t>(1, features)) {}
  explicit Places(const PanelLayout& panels)
      : floats_(panels.floats()),
        vector_(panels.vector_floats()),
        row_(kBlock),
        period_(panels.period),
        zeros_(panels.periods()) {}

  int64_t floats() const { return floats_; }
  // Of a feature, for the 16 samples of a vector.
  int64_t at(int64_t feature, int64_t vector) const {
    return vector * vector_ + (feature + feature / period_) * row_;
  }
  int64_t rows_of_zeros() const { return zeros_; }
  int64_t row_of_zeros(int64_t i, int64_t vector) const {
    return vector * vector_ + ((i + 1) * (period_ + 1) - 1) * row_;
  }

 private:
  int64_t floats_;
  int64_t vector_;
  int64_t row_;
  int64_t period_;
  int64_t zeros_ = 0;
};

// Four floats of each of four rows, at `to` a row of four each, `stride` apart.
inline void transpose_four(const float* const* rows, int64_t at, float* to, int64_t stride) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(rows[0] + at);
  __m128 b = _mm_loadu_ps(rows[1] + at);
  __m128 c = _mm_loadu_ps(rows[2] + at);
  __m128 d = _mm_loadu_ps(rows[3] + at);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_store_ps(to, a);
  _mm_store_ps(to + stride, b);
  _mm_store_ps(to + 2 * stride, c);
  _mm_store_ps(to + 3 * stride, d);
#else
  for (int64_t row = 0; row < 4; ++row) {
    for (int64_t col = 0; col < 4; ++col) to[col * stride + row] = rows[row][at + col];
  }
#endif
}

// Sixteen rows of as many floats.
struct Tile {
  alignas(64) float rows[kBlock][kBlock];
};

// The rows of a block where they are; those that are too few or too short, filled up in a copy.
class BlockRows {
 public:
  template <class RowAt>
  BlockRows(int64_t rows, int64_t length, const RowAt& row_at) {
    if (rows < kBlock || length < kBlock) filled_ = {};
    for (int64_t i = 0; i < kBlock; ++i) {
      rows_[i] = i < rows && length == kBlock ? row_at(i) : filled_.rows[i];
      if (i < rows && length < kBlock) std::copy_n(row_at(i), length, filled_.rows[i]);
    }
  }

  void transpose(Tile& result) const {
    for (int64_t i = 0; i < kBlock; i += 4) {
      for (int64_t k = 0; k < kBlock; k += 4) {
        transpose_four(rows_ + i, k, &result.rows[k][i], kBlock);
      }
    }
  }

 private:
  const float* rows_[kBlock];
  Tile filled_;
};

// row = clamp(row); spelled out, as compilers leave it one float at a time. A NaN stays a NaN.
inline void clamp_row(float lower, float upper, float* row) {
#if defined(__x86_64__)
  const __m128 least = _mm_set1_ps(lower);
  const __m128 most = _mm_set1_ps(upper);
  for (int64_t k = 0; k < kBlock; k += 4) {
    // The second operand is the one that survives a NaN.
    _mm_store_ps(row + k, _mm_min_ps(most, _mm_max_ps(least, _mm_load_ps(row + k))));
  }
#else
  for (int64_t k = 0; k < kBlock; ++k) {
    const float value = row[k] < lower ? lower : row[k];
    row[k] = value > upper ? upper : value;
  }
#endif
}

// Copies a row of a block: in a few instructions where it is whole.
inline void copy_row(const float* from, int64_t count, float* to) {
  if (count == kBlock) {
    std::memcpy(to, from, kBlock * sizeof(float));
  } else {
    std::copy_n(from, count, to);
  }
}

// Between torch's (batch, features) and such a matrix, block by block. Blocks go through a tile, so
// that each line of memory is touched once: rows that lie powers of two apart share few places in
// a cache. Threads share samples, as the product shares its columns, or features where these are
// few.
class Transpose {
 public:
  Transpose(const Team& team, int64_t features, int64_t batch, const Places& places)
      : features_(features),
        batch_(batch),
        vectors_((batch + kBlock - 1) / kBlock),
        blocks_((features + kBlock - 1) / kBlock),
        by_samples_(vectors_ >= kVectorsAThread * team.threads),
        parts_(by_samples_ ? copying_parts(team, vectors_, features * kBlock)
                           : copying_parts(team, blocks_, batch * kBlock)),
        places_(places) {}

  int64_t parts() const { return parts_; }
  int64_t floats() const { return whole_lines(places_.floats()); }

  void from_torch(int64_t part, const float* x, float* matrix) const {
    visit(part, [&](const Block& block) {
      const float* from = x + block.sample * features_ + block.feature;
      Tile tile;
      BlockRows(block.samples, block.features, [&](int64_t i) {
        return from + i * features_;
      }).transpose(tile);
      // Panels have their lanes in full.
      const int64_t lanes = places_.rows_of_zeros() > 0 ? kBlock : block.samples;
      for (int64_t i = 0; i < block.features; ++i) {
        copy_row(tile.rows[i], lanes, matrix + places_.at(block.feature + i, block.vector()));
      }
    });
    for (int64_t i = part; i < places_.rows_of_zeros(); i += parts_) {
      for (int64_t vector = 0; vector < vectors_; ++vector) {
        std::fill_n(matrix + places_.row_of_zeros(i, vector), kBlock, 0.0f);
      }
    }
  }

  // y = clamp(matrix^T + residual).
  void to_torch(int64_t part, const float* matrix, const Epilogue& e, float* y) const {
    visit(part, [&](const Block& block) {
      Tile tile;
      BlockRows(block.features, block.samples, [&](int64_t i) {
        return matrix + places_.at(block.feature + i, block.vector());
      }).transpose(tile);
      for (int64_t i = 0; i < block.samples; ++i) {
        const int64_t to = (block.sample + i) * features_ + block.feature;
        float* row = tile.rows[i];
        if (e.residual) {
          for (int64_t k = 0; k < block.features; ++k) row[k] += e.residual[to + k];
        }
        clamp_row(e.lower, e.upper, row);
        copy_row(row, block.features, y + to);
      }
    });
  }

 private:
  static constexpr int64_t kVectorsAThread = 4;

  struct Block {
    int64_t feature;
    int64_t features;
    int64_t sample;
    int64_t samples;
    int64_t vector() const { return sample / kBlock; }
  };

  // Calls run(block) for all of a part.
  template <class Run>
  void visit(int64_t part, const Run& run) const {
    const Range all_vectors{0, vectors_};
    const Range all_blocks{0, blocks_};
    const Range vectors = by_samples_ ? even_range(vectors_, part, parts_) : all_vectors;
    const Range blocks = by_samples_ ? all_blocks : even_range(blocks_, part, parts_);
    for (int64_t vector = vectors.begin; vector < vectors.end; ++vector) {
      const int64_t sample = vector * kBlock;
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const int64_t feature = block * kBlock;
        run(Block{feature, std::min(kBlock, features_ - feature), sample,
                  std::min(kBlock, batch_ - sample)});
      }
    }
  }

  int64_t features_;
  int64_t batch_;
  int64_t vectors_;
  int64_t blocks_;
  bool by_samples_;
  int64_t parts_;
  Places places_;
};

}  // namespace transpose
}  // namespace sparselt
