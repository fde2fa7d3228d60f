// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in rows of blocks. kernels.h says how x
// is laid out, block_rows_avx2.h how slices are multiplied.
//
// Slices of 16 rows are two of 8. Bound: 4 bytes a stored value and 2 a block, read once, so cold
// weights run at the memory's rate; in the cache one load of values and one broadcast a step bind.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "cpu/block_rows_avx2.h"

namespace sparselt::cpu {
namespace {

void multiply_slice(const SpmvCall& call, const BlockPlace& block, int64_t slice) {
  const int64_t height = call.weight.slice_height;
  if (call.lanes > 1) return multiply_block_lanes<4>(call, block, slice);
  if (height == 4) return multiply_block_column<__m128>(call, block, slice, 0);
  for (int64_t first = 0; first < height; first += 8) {
    multiply_block_column<__m256>(call, block, slice, first);
  }
}

}  // namespace

void bsell_spmv_avx2(const SpmvCall& call, Range sections) {
  multiply_block_sections<multiply_slice>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
