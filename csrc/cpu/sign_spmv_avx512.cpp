// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W of one magnitude a row. kernels.h says
// how x and its negative are laid out, spmv_avx512.h how slices are multiplied.
//
// A stored value is a column of 16 bits, which finds x or -x: no value is read, and none multiplied
// until the row's sum is done. Bound: 2 bytes a stored value, so that what finds 16 floats of x
// binds before the memory does.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/spmv_avx512.h"

namespace sparselt::cpu {

void sign_spmv_avx512(const SpmvCall& call, Range sections) {
  multiply_slices<SignColumns<kSliceRows>>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
