// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL. kernels.h says how x is
// laid out, slice_rows_neon.h how slices are multiplied. A stored value is 6 bytes that are read
// once. Not timed on hardware yet.
#if defined(__aarch64__)
#include "cpu/slice_rows_neon.h"

namespace sparselt::cpu {

void sell_spmv_neon(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_slice<false>>(call, sections);
}

}  // namespace sparselt::cpu

#endif  // __aarch64__
