// SPDX-License-Identifier: Apache-2.0
//
// What the spmv kernels of x86 share: the walks over slices, and the product with 2 to 16 columns.
//
// There, a register holds a row's sums, a lane a column, so that a stored value costs one broadcast
// and one multiply-add with x as memory operand for all columns at once: 2 loads, and a quarter of
// one for its column, whatever the number of columns. Include inside the target region, after
// <immintrin.h>, cpu/target.h and kernels.h; the unit brings its own type of 16 lanes, with the
// same functions as those of 8 and of 4 below.
#pragma once

namespace sparselt::cpu {
namespace {

// The weight is read once, start to end, in two streams. The hardware's own prefetching does not
// keep up: without this, weights that come from memory took 1.3 to 2 times as long.
constexpr int64_t kPrefetchValues = 512;  // stored values ahead
constexpr int64_t kPrefetchSigns = 1024;  // where a value is a column alone
constexpr int64_t kPrefetchDeltas = 1024;

// A row's products are added up in chains of this many, and the chains' sums after that: one chain
// of hundreds rounds away two to three times as much.
constexpr int64_t kChain = 32;

// With one column so many slices are walked side by side: a single one is two streams, fewer than
// the memory needs to run at its rate.
constexpr int kStreams = 4;

// Where the chain ends that begins at `step`.
inline int64_t chain_end(int64_t step, int64_t end) {
  return end - step > kChain ? step + kChain : end;
}

inline void prefetch(const void* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}
inline void prefetch(const float* values, const uint16_t* columns) {
  prefetch(values + kPrefetchValues);
  prefetch(columns + kPrefetchValues);
}

// How a weight says where the values of a step lie, a column of 16 bits for each row. An object
// walks one slice from its first step on; a unit may bring a class of its own. A weight that lies
// in a cache need not be fetched ahead: a prefetch takes the place of a load.
template <int kSliceRows, bool kCached = false>
struct SellColumns {
  static constexpr bool kSigns = false;
  const uint16_t* next(const SellView& w, int64_t step) {
    const uint16_t* columns = w.columns + step * kSliceRows;
    if (!kCached) prefetch(w.values + step * kSliceRows, columns);
    return columns;
  }
};
// Of the sign format: a value is what its column finds, and the row's magnitude comes last.
template <int kSliceRows, bool kCached = false>
struct SignColumns {
  static constexpr bool kSigns = true;
  const uint16_t* next(const SellView& w, int64_t step) {
    const uint16_t* columns = w.columns + step * kSliceRows;
    if (!kCached) prefetch(columns + kPrefetchSigns);
    return columns;
  }
};

// Four columns (16 bits each) in one register: a load for all four instead of one for each.
inline uint64_t load_four_columns(const uint16_t* columns) {
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_loadu_si64(columns)));
}

// Types of 8 and of 4 lanes under one name each, for the templates below.
inline __m256 load_lanes(const float* x, __m256) { return _mm256_load_ps(x); }
inline __m128 load_lanes(const float* x, __m128) { return _mm_load_ps(x); }
inline __m256 broadcast(float value, __m256) { return _mm256_set1_ps(value); }
inline __m128 broadcast(float value, __m128) { return _mm_set1_ps(value); }
inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m128 multiply_add(__m128 a, __m128 b, __m128 c) { return _mm_fmadd_ps(a, b, c); }
inline __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
inline __m128 add(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
// The second operand of max and min is the one that survives a NaN.
inline __m256 clamp(__m256 sum, __m256 lower, __m256 upper) {
  return _mm256_min_ps(upper, _mm256_max_ps(lower, sum));
}
inline __m128 clamp(__m128 sum, __m128 lower, __m128 upper) {
  return _mm_min_ps(upper, _mm_max_ps(lower, sum));
}
inline void store_lanes(float* y, __m256 value) { _mm256_store_ps(y, value); }
inline void store_lanes(float* y, __m128 value) { _mm_store_ps(y, value); }

// A block of a section: whether its sums begin or end there, and its part of x.
struct BlockPlace {
  bool is_first;
  bool is_last;
  const float* x;
};

// A row of y or of the residual, zeros beyond its columns.
template <class V>
V load_row(const SpmvCall& call, const float* from) {
  alignas(64) float row[kMaxSpmvColumns] = {};
  for (int64_t n = 0; n < call.columns; ++n) row[n] = from[n * call.y_column_stride];
  return load_lanes(row, V{});
}

template <class V>
void store_row(const SpmvCall& call, const BlockPlace& block, int64_t m, V sum) {
  const Epilogue& e = call.epilogue;
  float* y = call.y + m * call.y_row_stride;
  if (!block.is_first) sum = add(sum, load_row<V>(call, y));
  if (block.is_first && e.bias) sum = add(sum, broadcast(e.bias[m], V{}));
  if (block.is_last && e.residual) {
    sum = add(sum, load_row<V>(call, e.residual + m * call.y_row_stride));
  }
  if (block.is_last) sum = clamp(sum, broadcast(e.lower, V{}), broadcast(e.upper, V{}));
  alignas(64) float row[kMaxSpmvColumns] = {};
  store_lanes(row, sum);
  for (int64_t n = 0; n < call.columns; ++n) y[n * call.y_column_stride] = row[n];
}

// `kRows` rows of the slice at a time, as many as registers hold.
template <class Columns, int kSliceRows, int kRows, class V>
void multiply_columns(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(float);
  const SellView& w = call.weight;
  for (int first = 0; first < kSliceRows; first += kRows) {
    alignas(64) float sums[kRows * kLanes] = {};
    Columns walk{};
    const int64_t end = w.slice_steps[slice + 1];
    for (int64_t step = w.slice_steps[slice]; step < end;) {
      V sum[kRows];
      SPARSELT_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] = broadcast(0.0f, V{});
      for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
        const uint16_t* columns = walk.next(w, step) + first;
        const float* values = Columns::kSigns ? nullptr : w.values + step * kSliceRows + first;
        SPARSELT_UNROLL
        for (int r = 0; r < kRows; r += 4) {
          const uint64_t four = load_four_columns(columns + r);
          SPARSELT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const V x_row = load_lanes(block.x + (four >> (16 * i) & 0xffff) * kLanes, V{});
            if constexpr (Columns::kSigns) {
              sum[r + i] = add(x_row, sum[r + i]);
            } else {
              sum[r + i] = multiply_add(broadcast(values[r + i], V{}), x_row, sum[r + i]);
            }
          }
        }
      }
      SPARSELT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        store_lanes(sums + r * kLanes, add(sum[r], load_lanes(sums + r * kLanes, V{})));
      }
    }
    const int32_t* rows = w.slice_rows + slice * kSliceRows + first;
    for (int r = 0; r < kRows && rows[r] >= 0; ++r) {
      V sum = load_lanes(sums + r * kLanes, V{});
      if constexpr (Columns::kSigns) {
        const V zero = broadcast(0.0f, V{});
        sum = multiply_add(broadcast(w.values[rows[r]], V{}), sum, zero);
      }
      store_row(call, block, rows[r], sum);
    }
  }
}

// Adds one value of each row of a slice to its sum, a lane a row, given the columns.
template <class V>
using StepFunction = V (*)(const SellView& w, const float* x, int64_t step, const uint16_t* columns,
                           V chain);
// Brings the sums of a slice's rows to y.
template <class V>
using FinishFunction = void (*)(const SpmvCall& call, const BlockPlace& block, int64_t slice,
                                V sum);

template <class Columns, class V, StepFunction<V> kAdd>
inline V add_steps(const SellView& w, const float* x, int64_t step, int64_t end, Columns& walk,
                   V sum) {
  while (step < end) {
    V chain = broadcast(0.0f, V{});
    for (const int64_t stop = chain_end(step, end); step < stop; ++step) {
      chain = kAdd(w, x, step, walk.next(w, step), chain);
    }
    sum = add(sum, chain);
  }
  return sum;
}

// N slices, each `apart` from the one before, chain by chain: each is a stream of its own that the
// memory fetches ahead. The chains of a slice are those that it has alone.
template <int N, class Columns, class V, StepFunction<V> kAdd, FinishFunction<V> kFinish>
void multiply_together(const SpmvCall& call, const BlockPlace& block, int64_t slice,
                       int64_t apart) {
  const SellView& w = call.weight;
  const int32_t* slice_steps = w.slice_steps + slice;
  int64_t step[N];
  Columns walk[N] = {};
  V sum[N];
  int64_t least = slice_steps[1] - slice_steps[0];
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    step[i] = slice_steps[i * apart];
    const int64_t steps = slice_steps[i * apart + 1] - step[i];
    least = steps < least ? steps : least;
    sum[i] = broadcast(0.0f, V{});
  }
  for (; least >= kChain; least -= kChain) {
    V chain[N];
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) chain[i] = broadcast(0.0f, V{});
    for (int64_t k = 0; k < kChain; ++k) {
      SPARSELT_UNROLL
      for (int i = 0; i < N; ++i) {
        chain[i] = kAdd(w, block.x, step[i], walk[i].next(w, step[i]), chain[i]);
        ++step[i];
      }
    }
    SPARSELT_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = add(sum[i], chain[i]);
  }
  SPARSELT_UNROLL
  for (int i = 0; i < N; ++i) {
    const int64_t end = slice_steps[i * apart + 1];
    kFinish(call, block, slice + i * apart,
            add_steps<Columns, V, kAdd>(w, block.x, step[i], end, walk[i], sum[i]));
  }
}

// Block i, where those of a section follow those of the section before.
inline BlockPlace block_place(const SpmvCall& call, int64_t i) {
  const int64_t b = i % call.weight.num_blocks;
  return {b == 0, b + 1 == call.weight.num_blocks, call.x + b * call.block_stride};
}

// All slices with one column: those of the quarters of a block beside each other.
template <class Columns, class V, StepFunction<V> kAdd, FinishFunction<V> kFinish>
void multiply_one_column(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const BlockPlace block = block_place(call, i);
    const int64_t first = w.block_slices[i];
    const int64_t end = w.block_slices[i + 1];
    const int64_t quarter = (end - first) / kStreams;
    for (int64_t slice = first; slice < first + quarter; ++slice) {
      multiply_together<kStreams, Columns, V, kAdd, kFinish>(call, block, slice, quarter);
    }
    for (int64_t slice = first + kStreams * quarter; slice < end; ++slice) {
      multiply_together<1, Columns, V, kAdd, kFinish>(call, block, slice, 0);
    }
  }
}

using SliceFunction = void (*)(const SpmvCall& call, const BlockPlace& block, int64_t slice);

// All slices with 2 to 16 columns; `kWide` multiplies one with 9 to 16.
template <class Columns, int kSliceRows, SliceFunction kWide>
void multiply_few_columns(const SpmvCall& call, Range sections) {
  const SellView& w = call.weight;
  for (int64_t i = sections.begin * w.num_blocks; i < sections.end * w.num_blocks; ++i) {
    const BlockPlace block = block_place(call, i);
    for (int64_t slice = w.block_slices[i]; slice < w.block_slices[i + 1]; ++slice) {
      if (call.lanes == 4) {
        multiply_columns<Columns, kSliceRows, kSliceRows, __m128>(call, block, slice);
      } else if (call.lanes == 8) {
        multiply_columns<Columns, kSliceRows, kSliceRows, __m256>(call, block, slice);
      } else {
        kWide(call, block, slice);
      }
    }
  }
}

}  // namespace
}  // namespace sparselt::cpu
