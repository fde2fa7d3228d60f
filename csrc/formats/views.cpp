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
  STD_TORCH_CHECK(part.scalar_type() == type, name,
                  ": wrong dtype; indices are int32 (int16 in SELL), values float32");
  STD_TORCH_CHECK(part.is_contiguous() && part.numel() == length, name, ": expected ", length,
                  " contiguous elements, got ", part.numel());
  return static_cast<const T*>(part.const_data_ptr());
}

}  // namespace

const char* format_of(const Parts& parts) {
  STD_TORCH_CHECK(parts.size() == 3 || parts.size() == 5,
                  "parts: expected 3 tensors (csr, bsr) or 5 (sell, bsell, sign), got ",
                  parts.size());
  // Columns of sign are (steps, height). Values of BSELL are, of SELL (steps * height,).
  if (parts.size() == 5 && parts[3].dim() == 2) return "sign";
  if (parts.size() == 5) return parts[4].dim() == 1 ? "sell" : "bsell";
  // values of CSR are (nnz,), of blocks (blocks, block_rows, block_cols) even where these are 1
  // x 1.
  return parts[2].dim() == 1 ? "csr" : "bsr";
}

SparseView as_sparse_view(const Parts& parts, const int64_t* block, int64_t rows, int64_t cols) {
  const int64_t stored_rows = (rows + block[0] - 1) / block[0];
  const int64_t blocks = parts[1].numel();
  const SparseView view{
      data_of<int32_t>(parts[0], "crow_indices", ScalarType::Int, stored_rows + 1),
      data_of<int32_t>(parts[1], "col_indices", ScalarType::Int, blocks),
      data_of<float>(parts[2], "values", ScalarType::Float, blocks * block[0] * block[1]),
      rows,
      cols,
      block[0],
      block[1]};
  STD_TORCH_CHECK(view.crow_indices[stored_rows] == blocks, "crow_indices: expected to end at ",
                  blocks, ", got ", view.crow_indices[stored_rows]);
  return view;
}

SellView as_sell_view(const Parts& parts, const int64_t* block, int64_t rows, int64_t cols) {
  const int64_t num_blocks = std::max<int64_t>(1, (cols + block[1] - 1) / block[1]);
  const int64_t num_slices = parts[1].numel() - 1;
  const int64_t num_sections = (parts[0].numel() - 1) / num_blocks;
  STD_TORCH_CHECK(num_slices >= 0 && num_sections >= 0, "parts: an offsets part is empty");
  SellView view{
      data_of<int32_t>(parts[0], "block_slices", ScalarType::Int, num_sections * num_blocks + 1),
      data_of<int32_t>(parts[1], "slice_steps", ScalarType::Int, num_slices + 1),
      data_of<int32_t>(parts[2], "slice_rows", ScalarType::Int, num_slices * block[0]),
      nullptr,
      nullptr,
      rows,
      cols,
      block[0],
      block[1],
      num_blocks,
      num_sections};
  const int64_t stored = int64_t{view.slice_steps[num_slices]} * block[0];
  const bool shared_columns = parts[4].dim() == 2;  // a step has one column
  view.columns = data_of<uint16_t>(parts[3], "columns", ScalarType::Short,
                                   shared_columns ? stored / block[0] : stored);
  const bool shared_magnitudes = parts[3].dim() == 2;  // a row has one
  view.values =
      data_of<float>(parts[4], "values", ScalarType::Float, shared_magnitudes ? rows : stored);
  STD_TORCH_CHECK(view.block_slices[num_sections * num_blocks] == num_slices,
                  "block_slices: expected to end at ", num_slices);
  return view;
}

}  // namespace sparselt
