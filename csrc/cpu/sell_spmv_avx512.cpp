// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL. kernels.h says how x is
// laid out, spmv_avx512.h how slices are multiplied.
//
// With one column a lane is a row: a step of a slice loads 16 values, 16 columns of 16 bits, and
// gathers 16 floats of x. Fillers read a zero that lies behind x, so no mask is needed. Bound: a
// stored value is 6 bytes that are read once, so cold weights run at the memory's rate.
// Measured on one thread of a busy Intel machine, 4096 x 4096 with 80, 90 and 95 % zeros, weights
// cold, the least of many interleaved runs: 13 to 15 GB/s of encoded bytes, 0.7 to 1 of the rate at
// which torch sums a buffer of that size, and 4.4, 5.8 and 11 times torch's dense linear. In the
// cache the gather gained 0 to 12 % over sell_spmv_avx2's single loads; where gathers are slow that
// kernel may win, so a plan times both.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu/spmv_avx512.h"

namespace sparselt::cpu {

void sell_spmv_avx512(const SpmvCall& call, Range sections) {
  multiply_slices<SellColumns<kSliceRows>>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
