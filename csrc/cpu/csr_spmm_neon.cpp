// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) for W in CSR and a row-major x.
//
// A call owns rows [rows.begin, rows.end) and columns [columns.begin, columns.end). Tiles of up to
// 64 columns are outermost, as in csr_spmm_avx2: the panel of x that a tile reads is reused from
// cache by every row of W, and a row's tile of y lives in 16 registers from bias to clamp. A stored
// value costs its load, its column's, and a load and a multiply-add a vector, the value taken from
// a lane: with 2 loads and 2 multiply-adds a cycle the bound is 16 / 18 of peak. Sixteen sums hide
// a latency of 4 cycles on up to four multiply-add pipes. Slow where a panel outgrows the caches
// (many columns of W), and at a handful of columns, where too few sums hide the latency. With one
// column the product is a dot product a row, in eight partial sums, chosen by the width of the
// whole product so that the order of summation does not depend on the split.
#if defined(__aarch64__)
#include "cpu/tile_neon.h"

namespace sparselt::cpu {
namespace {

constexpr int kTileVectors = 16;  // 64 columns: 16 of 32 registers

template <int NV, bool kNarrow>
void multiply_tile(const SpmmCall& call, Range rows, int64_t column, LastVector last) {
  const Epilogue& e = call.epilogue;
  const RowOffsets offset{call.x_stride};
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float32x4_t sum[NV];
    accumulate<NV, kNarrow>(sum, e.bias ? e.bias[m] : 0.0f, call.weight,
                            call.weight.crow_indices[m], call.weight.crow_indices[m + 1], offset,
                            call.x + column, last);
    const int64_t at = m * call.y_stride + column;
    store_tile<NV, kNarrow>(sum, e, e.residual ? e.residual + at : nullptr, call.y + at, last);
  }
}

// The instance for `vectors`, NV of them or fewer.
template <int NV>
void multiply_columns(const SpmmCall& call, Range rows, int64_t column, int64_t vectors,
                      LastVector last) {
  if (vectors == NV) return multiply_tile<NV, false>(call, rows, column, last);
  if constexpr (NV > 1) multiply_columns<NV - 1>(call, rows, column, vectors, last);
}

// The x of 4 stored values: NEON cannot gather.
inline float32x4_t collect(const float* x, const int32_t* columns, int64_t stride) {
  float32x4_t data = vld1q_dup_f32(x + columns[0] * stride);
  data = vld1q_lane_f32(x + columns[1] * stride, data, 1);
  data = vld1q_lane_f32(x + columns[2] * stride, data, 2);
  return vld1q_lane_f32(x + columns[3] * stride, data, 3);
}

void multiply_vector(const SpmmCall& call, Range rows) {
  const SparseView& w = call.weight;
  const Epilogue& e = call.epilogue;
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float32x4_t sum[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    float rest = e.bias ? e.bias[m] : 0.0f;
    int64_t i = w.crow_indices[m];
    const int64_t end = w.crow_indices[m + 1];
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i + half * kLanes;
        sum[half] = vfmaq_f32(sum[half], vld1q_f32(w.values + at),
                              collect(call.x, w.col_indices + at, call.x_stride));
      }
    }
    for (; i < end; ++i) rest += w.values[i] * call.x[w.col_indices[i] * call.x_stride];
    float out = rest + vaddvq_f32(vaddq_f32(sum[0], sum[1]));
    if (e.residual) out += e.residual[m * call.y_stride];
    out = out < e.lower ? e.lower : out;  // written so that a NaN stays a NaN
    call.y[m * call.y_stride] = out > e.upper ? e.upper : out;
  }
}

}  // namespace

void csr_spmm_neon(const SpmmCall& call, Range rows, Range columns) {
  if (call.columns == 1) return multiply_vector(call, rows);
  const Tiling tiling = make_tiling<kTileVectors>(columns);
  for (int64_t t = 0; t < tiling.tiles; ++t) {
    const LastVector last = tiling.last(t);
    if (last.lanes < kLanes) {
      multiply_tile<1, true>(call, rows, tiling.begin(t), last);
    } else {
      multiply_columns<kTileVectors>(call, rows, tiling.begin(t), tiling.width(t), last);
    }
  }
}

}  // namespace sparselt::cpu

#endif  // __aarch64__
