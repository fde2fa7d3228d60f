// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual).
#include "ops/spmm.h"

#include <torch/headeronly/util/Exception.h>

#include "ops/panels.h"
#include "ops/partition.h"
#include "ops/spmv.h"

namespace sparselt {

void run_spmm(const Weight& weight, const float* x, float* y, int64_t columns,
              const Epilogue& epilogue) {
  if (weight.kernel->panel) {
    const PanelSource source{x,       1, 0, columns, columns, 1,
                             columns, 1, 1, columns, false,   {{0, 0, 0}}};
    return run_panels(weight, source, y, epilogue);
  }
  if (weight.kernel->spmv) {
    const Layout layout{columns, 1};
    return run_spmv(weight, x, layout, y, layout, columns, epilogue);
  }
  const SpmmCall call{weight.view, x, columns, y, columns, columns, epilogue};
  const Range rows{0, stored_rows(weight.view)};
  parallel_product(
      weight.view, 1, columns, weight.kernel->tile_columns, [&](int64_t) { return rows; },
      [&](int64_t, Range some_rows, Range some_columns) {
        weight.kernel->spmm(call, some_rows, some_columns);
      });
}

void spmm_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
              OptionalTensor residual, OptionalBound lower, OptionalBound upper,
              std::string kernel) {
  const Weight weight = as_weight(parts, meta, kernel, "spmm", 2);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == weight.cols, "x: expected (", weight.cols,
                  ", N), got rank ", x.dim(), " with ", x.dim() > 0 ? x.size(0) : 0, " rows");
  const int64_t columns = x.size(1);
  const std::vector<int64_t> shape{weight.rows, columns};
  check_output(out, shape);
  const Tensor input = as_float_input(x, "x");
  const HeldEpilogue epilogue = as_epilogue(bias, residual, lower, upper, weight.rows, shape);
  run_spmm(weight, const_float_data(input), float_data(out), columns, epilogue.pointers);
}

Tensor spmm(Tensor x, Parts parts, Ints meta, OptionalTensor bias, OptionalTensor residual,
            OptionalBound lower, OptionalBound upper, std::string kernel) {
  STD_TORCH_CHECK(meta.size() == 4 && x.dim() == 2, "spmm: expected a 2-D weight and x of (K, N)");
  Tensor out = new_output({meta[2], x.size(1)});
  spmm_out(x, out, std::move(parts), std::move(meta), bias, residual, lower, upper,
           std::move(kernel));
  return out;
}

}  // namespace sparselt
