// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual).
#include "ops/spmm.h"

#include <torch/headeronly/util/Exception.h>

#include "ops/check.h"
#include "ops/partition.h"

namespace sparselt {

void run_spmm(const KernelInfo& kernel, const SpmmCall& call) {
  const Range rows{0, stored_rows(call.weight)};
  parallel_product(
      call.weight, 1, call.columns, kernel.tile_columns, [&](int64_t) { return rows; },
      [&](int64_t, Range some_rows, Range columns) { kernel.spmm(call, some_rows, columns); });
}

void spmm_out(Tensor x, Tensor out, Parts parts, Ints meta, OptionalTensor bias,
              OptionalTensor residual, OptionalBound lower, OptionalBound upper,
              std::string kernel) {
  const Weight weight = as_weight(parts, meta, kernel, "spmm", 2);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == weight.view.cols, "x: expected (", weight.view.cols,
                  ", N), got rank ", x.dim(), " with ", x.dim() > 0 ? x.size(0) : 0, " rows");
  const int64_t columns = x.size(1);
  const std::vector<int64_t> shape{weight.view.rows, columns};
  check_output(out, shape);
  const Tensor input = as_float_input(x, "x");
  const HeldEpilogue epilogue = as_epilogue(bias, residual, lower, upper, weight.view.rows, shape);
  run_spmm(*weight.kernel, {weight.view, const_float_data(input), columns, float_data(out), columns,
                            columns, epilogue.pointers});
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
