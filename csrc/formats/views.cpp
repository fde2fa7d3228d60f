// SPDX-License-Identifier: Apache-2.0
#include "formats/views.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace sparselt {
namespace {

using torch::headeronly::ScalarType;

template <class T>
const T* data_of(const Tensor& part, const char* name, ScalarType type, int64_t length) {
  STD_TORCH_CHECK(part.is_cpu(), name, ": expected a CPU tensor; move the weight with .cpu()");
  STD_TORCH_CHECK(
      part.scalar_type() == type, name,
      ": wrong dtype; indices are int32 (columns of slices int16, of deltas uint8), values "
      "float32");
  STD_TORCH_CHECK(part.is_contiguous() && part.numel() == length, name, ": expected ", length,
                  " contiguous elements, got ", part.numel());
  return static_cast<const T*>(part.const_data_ptr());
}

// Refuses parts of another number than the format of the weight's kernel has, or another rank of
// one that tells it from similar formats.
void check_format(const Parts& parts, size_t count, size_t place, int64_t rank,
                  const Weight& weight) {
  STD_TORCH_CHECK(parts.size() == count && parts[place].dim() == rank, "parts: expected the ",
                  count, " of format ", weight.kernel->format, ", which ", weight.kernel->name,
                  " reads, got those of another");
}

void view_compressed(const Parts& parts, const int64_t* block, Weight& weight) {
  const int64_t stored_rows = (weight.rows + block[0] - 1) / block[0];
  const int64_t blocks = parts[1].numel();
  weight.view = {
      data_of<int32_t>(parts[0], "crow_indices", ScalarType::Int, stored_rows + 1),
      data_of<int32_t>(parts[1], "col_indices", ScalarType::Int, blocks),
      data_of<float>(parts[2], "values", ScalarType::Float, blocks * block[0] * block[1]),
      weight.rows,
      weight.cols,
      block[0],
      block[1]};
  const int32_t last = weight.view.crow_indices[stored_rows];
  STD_TORCH_CHECK(last == blocks, "crow_indices: expected to end at ", blocks, ", got ", last);
}

void view_csr(const Parts& parts, const int64_t* block, Weight& weight) {
  check_format(parts, 3, 2, 1, weight);
  view_compressed(parts, block, weight);
}

void view_bsr(const Parts& parts, const int64_t* block, Weight& weight) {
  check_format(parts, 3, 2, 3, weight);  // even where blocks are 1 x 1
  view_compressed(parts, block, weight);
}

// What the parts of all sliced formats share; columns and values are left to the caller. Returns
// the number of steps.
int64_t view_slices(const Parts& parts, const int64_t* block, Weight& weight) {
  const int64_t num_blocks = std::max<int64_t>(1, (weight.cols + block[1] - 1) / block[1]);
  const int64_t num_slices = parts[1].numel() - 1;
  const int64_t num_sections = (parts[0].numel() - 1) / num_blocks;
  STD_TORCH_CHECK(num_slices >= 0 && num_sections >= 0, "parts: an offsets part is empty");
  SellView& view = weight.sell;
  view = {
      data_of<int32_t>(parts[0], "block_slices", ScalarType::Int, num_sections * num_blocks + 1),
      data_of<int32_t>(parts[1], "slice_steps", ScalarType::Int, num_slices + 1),
      data_of<int32_t>(parts[2], "slice_rows", ScalarType::Int, num_slices * block[0]),
      nullptr,
      nullptr,
      weight.rows,
      weight.cols,
      block[0],
      block[1],
      num_blocks,
      num_sections};
  STD_TORCH_CHECK(view.block_slices[num_sections * num_blocks] == num_slices,
                  "block_slices: expected to end at ", num_slices);
  return view.slice_steps[num_slices];
}

void view_entries(const Parts& parts, int64_t columns, int64_t values, Weight& weight) {
  weight.sell.columns = data_of<uint16_t>(parts[3], "columns", ScalarType::Short, columns);
  weight.sell.values = data_of<float>(parts[4], "values", ScalarType::Float, values);
}

void view_sell(const Parts& parts, const int64_t* block, Weight& weight) {
  check_format(parts, 5, 3, 1, weight);
  check_format(parts, 5, 4, 1, weight);
  const int64_t stored = view_slices(parts, block, weight) * block[0];
  view_entries(parts, stored, stored, weight);
}

void view_bsell(const Parts& parts, const int64_t* block, Weight& weight) {
  check_format(parts, 5, 4, 2, weight);
  const int64_t steps = view_slices(parts, block, weight);
  view_entries(parts, steps, steps * block[0], weight);
  weight.sell.shared_columns = true;
}

void view_sign(const Parts& parts, const int64_t* block, Weight& weight) {
  check_format(parts, 5, 3, 2, weight);
  const int64_t stored = view_slices(parts, block, weight) * block[0];
  view_entries(parts, stored, weight.rows, weight);
  weight.sell.mirrored = true;
}

void view_delta(const Parts& parts, const int64_t* block, Weight& weight) {
  check_format(parts, 5, 3, 1, weight);
  const int64_t stored = view_slices(parts, block, weight) * block[0];
  weight.sell.deltas = data_of<uint8_t>(parts[3], "columns", ScalarType::Byte, stored);
  weight.sell.values = data_of<float>(parts[4], "values", ScalarType::Float, stored);
}

void view_bits(const Parts& parts, const int64_t*, Weight& weight) {
  check_format(parts, 3, 1, 2, weight);
  const int64_t masks = (weight.cols + kMaskBits - 1) / kMaskBits;
  const int64_t values = parts[2].numel();
  weight.bits = {data_of<int32_t>(parts[0], "crow_indices", ScalarType::Int, weight.rows + 1),
                 data_of<uint16_t>(parts[1], "masks", ScalarType::Short, weight.rows * masks),
                 data_of<float>(parts[2], "values", ScalarType::Float, values), weight.rows,
                 weight.cols};
  STD_TORCH_CHECK(weight.bits.crow_indices[weight.rows] + kMaskBits == values, "values: expected ",
                  kMaskBits, " more than the last row ends at");
}

void view_window(const Parts& parts, const int64_t*, Weight& weight) {
  check_format(parts, 5, 3, 2, weight);
  const int64_t slices = (weight.rows + kWindowLanes - 1) / kWindowLanes;
  const int64_t steps = parts[2].numel();
  weight.window = {data_of<int32_t>(parts[0], "slice_steps", ScalarType::Int, slices + 1),
                   data_of<int32_t>(parts[1], "slice_rows", ScalarType::Int, slices * kWindowLanes),
                   data_of<uint16_t>(parts[2], "windows", ScalarType::Short, steps),
                   data_of<uint8_t>(parts[3], "columns", ScalarType::Byte, steps * kWindowLanes),
                   data_of<float>(parts[4], "values", ScalarType::Float, steps * kWindowLanes),
                   weight.rows,
                   weight.cols};
  STD_TORCH_CHECK(weight.window.slice_steps[slices] == steps, "slice_steps: expected to end at ",
                  steps);
}

struct FormatView {
  std::string_view format;
  void (*view)(const Parts& parts, const int64_t* block, Weight& weight);
};

// A line a format that kernels of the CPU read.
constexpr FormatView kViews[] = {
    {"csr", view_csr},   {"bsr", view_bsr},   {"sell", view_sell},   {"bsell", view_bsell},
    {"sign", view_sign}, {"bits", view_bits}, {"delta", view_delta}, {"window", view_window},
};

}  // namespace

void view_parts(const Parts& parts, const int64_t* block, Weight& weight) {
  for (const FormatView& known : kViews) {
    if (known.format == weight.kernel->format) return known.view(parts, block, weight);
  }
  STD_TORCH_CHECK(false, "format ", weight.kernel->format, " has no view in formats/views.cpp");
}

}  // namespace sparselt
