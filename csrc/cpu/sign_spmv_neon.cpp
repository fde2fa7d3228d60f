// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W of one magnitude a row. kernels.h says
// how x and its negative are laid out, slice_rows_neon.h how slices are multiplied: a stored value
// is a column of 16 bits, which finds x or -x. Not timed on hardware yet.
#if defined(__aarch64__)
#include "cpu/slice_rows_neon.h"

namespace sparselt::cpu {

void sign_spmv_neon(const SpmvCall& call, Range sections) {
  multiply_sections<multiply_slice<true>>(call, sections);
}

}  // namespace sparselt::cpu

#endif  // __aarch64__
