// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W of one magnitude a row. kernels.h says
// how x and its negative are laid out, spmv_avx2.h how slices are multiplied.
//
// A stored value is a column of 16 bits, which finds x or -x: no value is read, and none multiplied
// until the row's sum is done. Bound: 2 bytes a stored value, so that what finds 8 floats of x
// binds before the memory does.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma,bmi")
#include "cpu/spmv_avx2.h"

namespace sparselt::cpu {

void sign_spmv_avx2(const SpmvCall& call, Range sections) {
  multiply_slices<SignColumns>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
