// SPDX-License-Identifier: Apache-2.0
//
// What the AVX2 panel kernels share: what is done with sums from block to block and at the end.
// Include inside the target region, after <immintrin.h>, cpu/target.h and kernels.h.
#pragma once

#include "cpu/ahead.h"
#include "cpu/panel_copy_avx2.h"

namespace sparselt::cpu {
namespace {

// Where rows of y, or of the residual, begin: the number of a row's first float. Without a
// division, which several rows a slice would wait for.
class RowPlaces {
 public:
  RowPlaces(const PanelRows& rows, int64_t num_rows)
      : stride_(rows.stride),
        periods_(rows.period < num_rows ? (uint64_t{1} << kShift) / rows.period + 1 : 0) {}

  int64_t operator()(int64_t m) const {
    const uint64_t periods = static_cast<uint64_t>(m) * periods_ >> kShift;
    return (m + static_cast<int64_t>(periods)) * stride_;
  }

 private:
  // Exact while m times the period is less than two to the power of this.
  static constexpr int kShift = 40;

  int64_t stride_;
  uint64_t periods_;  // that a row makes, in units of two to the power of -kShift
};

// The second operand of max and min is the one that survives a NaN.
inline __m256 clamp(__m256 sum, __m256 lower, __m256 upper) {
  return _mm256_min_ps(upper, _mm256_max_ps(lower, sum));
}

// Lanes `bits` of half a vector. Masked stores are slow on AMD.
inline void store_lanes(float* at, unsigned bits, __m256 sum) {
  if (bits == kHalf) {
    _mm256_storeu_ps(at, sum);
  } else if (bits != 0) {
    _mm256_maskstore_ps(at, half_mask(bits), sum);
  }
}

// What becomes of the sums of a block's row.
enum class Ending {
  kKept,    // there is another block
  kPieces,  // the last block: kept until all of the row is there, then stored piece by piece
  kPartly,  // the last block, and each vector is one piece of y and of the residual
  kWhole,   // so, and every lane of them is meant
};

template <int NV>
Ending ending_of(const PanelCall& call, bool is_last) {
  if (!is_last) return Ending::kKept;
  const bool has_residual = call.epilogue.residual != nullptr;
  const PanelRows& y = call.panel.y_rows;
  const PanelRows& residual = call.panel.residual_rows;
  if (y.num_pieces != NV || (has_residual && residual.num_pieces != NV)) return Ending::kPieces;
  bool whole = true;
  for (int v = 0; v < NV; ++v) {
    whole = whole && y.pieces[v].mask == kWholeMask;
    whole = whole && (!has_residual || residual.pieces[v].mask == kWholeMask);
  }
  return whole ? Ending::kWhole : Ending::kPartly;
}

// The rows of a slice that are asked for some slices ahead.
constexpr int64_t kSlicesAhead = 4;

// Ends the rows of a block: what that needs of the call, read once and not again after each store,
// which for all that GCC knows may have changed it.
template <int NV, Ending kEnding>
class Ends {
 public:
  Ends(const PanelCall& call, bool is_first)
      : sums_(call.sums),
        bias_(call.epilogue.bias),
        is_first_(is_first),
        has_residual_(call.epilogue.residual != nullptr),
        y_(call.panel.y, call.panel.y_rows, call.weight.rows),
        residual_(call.epilogue.residual, call.panel.residual_rows, call.weight.rows),
        lower_(call.epilogue.lower),
        upper_(call.epilogue.upper) {}

  // Ends row m, registers [first, first + N), but for storing pieces. (Inlined, or GCC 12 would
  // keep sums in memory, and in the loops that make them at that.)
  template <int N>
  [[gnu::always_inline]] inline void end_row(int64_t m, int first, __m256 (&sum)[N]) const {
    float* sums = sums_of(m) + first * kLanes;
    // GCC would compute an address for each register.
    asm("" : "+r"(sums));
    if (is_first_) {
      const __m256 bias = _mm256_set1_ps(bias_ ? bias_[m] : 0.0f);
      SPARSELT_UNROLL
      for (int i = 0; i < N; ++i) sum[i] = _mm256_add_ps(bias, sum[i]);
    } else {
      SPARSELT_UNROLL
      for (int i = 0; i < N; ++i) sum[i] = _mm256_add_ps(_mm256_load_ps(sums + i * kLanes), sum[i]);
    }
    if constexpr (kIsLast) {
      finish_row<N>(m, first, sum);
    } else {
      SPARSELT_UNROLL
      for (int i = 0; i < N; ++i) _mm256_store_ps(sums + i * kLanes, sum[i]);
    }
  }

  // Residual, clamp and store, piece by piece, of a row all of whose sums are kept.
  void store_row(int64_t m) const {
    float* sums = sums_of(m);
    if (has_residual_) {
      const float* residual = residual_.row(m);
      for (int i = 0; i < 2 * residual_.num_pieces; ++i) {
        const Piece& piece = residual_.pieces[i / 2];
        const unsigned bits = half_bits(piece, i % 2);
        float* at = sums + piece.vector * kPieceLanes + i % 2 * kLanes;
        const __m256 more = load_lanes(residual + piece.offset + i % 2 * kLanes, bits);
        const __m256 sum = _mm256_load_ps(at);
        const __m256 lanes = _mm256_castsi256_ps(half_mask(bits));
        _mm256_store_ps(at, _mm256_blendv_ps(sum, _mm256_add_ps(sum, more), lanes));
      }
    }
    const __m256 lower = _mm256_set1_ps(lower_);
    const __m256 upper = _mm256_set1_ps(upper_);
    float* y = y_.row(m);
    for (int i = 0; i < 2 * y_.num_pieces; ++i) {
      const Piece& piece = y_.pieces[i / 2];
      const float* at = sums + piece.vector * kPieceLanes + i % 2 * kLanes;
      const __m256 out = clamp(_mm256_load_ps(at), lower, upper);
      store_lanes(y + piece.offset + i % 2 * kLanes, half_bits(piece, i % 2), out);
    }
  }

  // Rows of y are far apart and come in the order of their lengths, which no hardware foresees:
  // asks for those of a slice some slices on, and of the residual. `rows` are the slice's of
  // `height`, `left` the slices from it on. (Inlined: GCC 12 takes a function that only prefetches
  // for one without effect and drops its calls.)
  [[gnu::always_inline]] inline void prefetch(const int32_t* rows, int64_t height,
                                              int64_t left) const {
    if (!kIsLast || left <= kSlicesAhead) return;
    for (int64_t r = kSlicesAhead * height; r < (kSlicesAhead + 1) * height; ++r) {
      if (rows[r] < 0) continue;
      const int64_t y = y_.place(rows[r]);
      SPARSELT_UNROLL
      for (int v = 0; v < NV; ++v) __builtin_prefetch(y_.vectors[v] + y, 1);
      if (!has_residual_) continue;
      const int64_t residual = residual_.place(rows[r]);
      SPARSELT_UNROLL
      for (int v = 0; v < NV; ++v) __builtin_prefetch(residual_.vectors[v] + residual);
    }
  }

 private:
  static constexpr bool kIsLast = kEnding == Ending::kWhole || kEnding == Ending::kPartly;

  // y or the residual.
  struct Rows {
    Rows(const float* base, const PanelRows& rows, int64_t num_rows)
        : first(const_cast<float*>(base)),
          place(rows, num_rows),
          pieces(rows.pieces),
          num_pieces(rows.num_pieces) {
      for (int v = 0; kIsLast && base && v < NV; ++v) vectors[v] = first + pieces[v].offset;
    }
    float* row(int64_t m) const { return first + place(m); }

    float* first;
    RowPlaces place;
    const Piece* pieces;
    int num_pieces;
    float* vectors[NV] = {};  // where those of row 0 are, if each is one piece
  };

  float* sums_of(int64_t m) const { return sums_ + m * (NV * kPieceLanes); }

  static unsigned bits_of(const Piece& piece, int half) {
    return kEnding == Ending::kWhole ? kHalf : half_bits(piece, half);
  }

  // Of a panel of vectors that are one piece each.
  template <int N>
  [[gnu::always_inline]] inline void finish_row(int64_t m, int first, __m256 (&sum)[N]) const {
    if (has_residual_) {
      const int64_t place = residual_.place(m);
      SPARSELT_UNROLL
      for (int i = 0; i < N; ++i) {
        const int v = (first + i) / 2, half = (first + i) % 2;
        const float* at = residual_.vectors[v] + place + half * kLanes;
        sum[i] = _mm256_add_ps(sum[i], load_lanes(at, bits_of(residual_.pieces[v], half)));
      }
    }
    const int64_t place = y_.place(m);
    const __m256 lower = _mm256_set1_ps(lower_);
    const __m256 upper = _mm256_set1_ps(upper_);
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) {
      const int v = (first + i) / 2, half = (first + i) % 2;
      float* at = y_.vectors[v] + place + half * kLanes;
      store_lanes(at, bits_of(y_.pieces[v], half), clamp(sum[i], lower, upper));
    }
  }

  float* sums_;
  const float* bias_;
  bool is_first_;
  bool has_residual_;
  Rows y_;
  Rows residual_;
  float lower_;
  float upper_;
};

// Slices of one block of one section, those of Slices<NV, ending>::multiply.
template <template <int, Ending> class Slices, int NV>
void multiply_block(const PanelCall& call, const XBlock& x, Range slices, bool is_first,
                    bool is_last, Ahead& ahead) {
  switch (ending_of<NV>(call, is_last)) {
    case Ending::kKept:
      return Slices<NV, Ending::kKept>::multiply(call, x, slices, is_first, ahead);
    case Ending::kPieces:
      return Slices<NV, Ending::kPieces>::multiply(call, x, slices, is_first, ahead);
    case Ending::kPartly:
      return Slices<NV, Ending::kPartly>::multiply(call, x, slices, is_first, ahead);
    case Ending::kWhole:
      return Slices<NV, Ending::kWhole>::multiply(call, x, slices, is_first, ahead);
  }
}

// The panel, block by block of columns.
template <template <int, Ending> class Slices, int NV>
void multiply_panel(const PanelCall& call, Range sections) {
  const SellView& w = call.weight;
  const bool in_one_go = !call.panel.loads && call.panel.x_block_stride == 0;
  const int64_t slices =
      w.block_slices[sections.end * w.num_blocks] - w.block_slices[sections.begin * w.num_blocks];
  Ahead ahead(call.panel.next, slices);
  for (int64_t block = 0; block < w.num_blocks; ++block) {
    const XBlock x = x_of_block<NV>(call, block);
    if (!in_one_go) ahead = Ahead(lines_after(call, NV, block), slices / w.num_blocks);
    for (int64_t section = sections.begin; section < sections.end; ++section) {
      const int32_t* of_block = w.block_slices + section * w.num_blocks + block;
      multiply_block<Slices, NV>(call, x, {of_block[0], of_block[1]}, block == 0,
                                 block + 1 == w.num_blocks, ahead);
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
