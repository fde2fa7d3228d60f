// SPDX-License-Identifier: Apache-2.0
//
// y (..., M) = clamp(x (..., K) W^T + bias + residual): torch's layout, where features lie next to
// each other. Kernels want the batch to lie next to each other instead, so x is transposed before
// and y after; a batch of one needs neither, and spmv kernels take any layout.
#include <torch/headeronly/util/Exception.h>

#include "ops/check.h"
#include "ops/partition.h"
#include "ops/spmm.h"
#include "ops/spmv.h"

namespace sparselt {
namespace {

constexpr int64_t kTransposeBlock = 16;  // rows and columns: 16 cache lines in, 16 out

// to (columns, rows) = clamp(from (rows, columns)^T + residual).
void transpose(const float* from, int64_t rows, int64_t columns, const Epilogue& e, float* to) {
  const int64_t grain =
      std::max<int64_t>(1, (1 << 15) / (std::max<int64_t>(columns, 1) * kTransposeBlock));
  const int64_t blocks = (rows + kTransposeBlock - 1) / kTransposeBlock;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last_row = std::min(rows, (block + 1) * kTransposeBlock);
      for (int64_t first = 0; first < columns; first += kTransposeBlock) {
        const int64_t last = std::min(columns, first + kTransposeBlock);
        for (int64_t column = first; column < last; ++column) {
          for (int64_t row = block * kTransposeBlock; row < last_row; ++row) {
            float value = from[row * columns + column];
            if (e.residual) value += e.residual[column * rows + row];
            value = value < e.lower ? e.lower : value;  // written so that a NaN stays a NaN
            to[column * rows + row] = value > e.upper ? e.upper : value;
          }
        }
      }
    }
  });
}

}  // namespace

Tensor linear(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
              OptionalBound lower, OptionalBound upper, std::string kernel) {
  const Weight weight = as_weight(parts, meta, kernel, "spmm", 2);
  const int64_t rows = weight.rows;
  const int64_t cols = weight.cols;
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && shape.back() == cols, "x: expected (..., ", cols,
                  "), got a last size of ", shape.empty() ? 0 : shape.back());
  int64_t batch = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) batch *= shape[i];
  shape.back() = rows;
  const Tensor input = as_float_input(x, "x");
  const HeldEpilogue held = as_epilogue(bias, residual, lower, upper, rows, shape);
  const Epilogue& e = held.pointers;
  Tensor out = new_output(shape);
  if (weight.kernel->spmv) {
    run_spmv(weight, const_float_data(input), {1, cols}, float_data(out), {1, rows}, batch, e);
    return out;
  }
  if (batch <= 1) {
    if (batch == 1) run_spmm(weight, const_float_data(input), float_data(out), 1, e);
    return out;
  }
  const Epilogue none = as_epilogue({}, {}, {}, {}, 0, {}).pointers;
  const Tensor columns_in = new_output({cols, batch});
  const Tensor columns_out = new_output({rows, batch});
  transpose(const_float_data(input), batch, cols, none, float_data(columns_in));
  Epilogue in_kernel = none;
  in_kernel.bias = e.bias;
  run_spmm(weight, float_data(columns_in), float_data(columns_out), batch, in_kernel);
  transpose(float_data(columns_out), rows, batch, e, float_data(out));
  return out;
}

}  // namespace sparselt
