// SPDX-License-Identifier: Apache-2.0
//
// y (M, N) = clamp(W (M, K) x (K, N) + bias + residual).
#include "ops/spmm.h"

#include <torch/headeronly/util/Exception.h>

#include "ops/check.h"
#include "ops/panels.h"
#include "ops/partition.h"
#include "ops/run_task.h"
#include "ops/spmv.h"

namespace sparselt {
namespace {

// By an spmm kernel.
class SpmmTask final : public Task {
 public:
  SpmmTask(const Team& team, const Weight& weight, int64_t columns, const Epilogue& epilogue)
      : weight_(weight),
        columns_(columns),
        epilogue_(epilogue),
        split_(team, weight.view, 1, columns, weight.kernel->tile_columns) {}

  int64_t parts(int64_t) const override { return split_.parts(); }

  void run(int64_t, int64_t part, const Operands& operands) const override {
    SpmmCall call{weight_.view, operands.x, columns_, operands.y, columns_, columns_, epilogue_};
    call.epilogue.residual = operands.residual;
    const Range all{0, stored_rows(weight_.view)};
    split_.visit(
        weight_.view, part, [&](int64_t) { return all; },
        [&](int64_t, Range rows, Range columns) { weight_.kernel->spmm(call, rows, columns); });
  }

 private:
  const Weight weight_;
  const int64_t columns_;
  const Epilogue epilogue_;
  const ProductSplit split_;
};

}  // namespace

TaskPointer make_spmm_task(const Team& team, const Weight& weight, int64_t columns,
                           const Epilogue& epilogue) {
  if (weight.kernel->panel) {
    const PanelSource source{1, 0, columns, columns, 1, columns, 1, 1, columns, false, {{0, 0, 0}}};
    return std::make_unique<PanelTask>(team, weight, epilogue, source);
  }
  if (weight.kernel->spmv) {
    const Layout layout{columns, 1};
    return make_spmv_task(team, weight, layout, layout, columns, epilogue);
  }
  return std::make_unique<SpmmTask>(team, weight, columns, epilogue);
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
  const TaskPointer task = make_spmm_task(torch_team(), weight, columns, epilogue.pointers);
  run_task(*task, const_float_data(input), epilogue.residual_data(), float_data(out));
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
