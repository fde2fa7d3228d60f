// SPDX-License-Identifier: Apache-2.0
//
// y = clamp(W x + bias + residual) with few columns for W in sliced ELL. kernels.h says how x is
// laid out, spmv_avx2.h how slices are multiplied.
//
// With one column a lane is a row: a step of a slice loads 8 values and 8 columns of 16 bits, and
// puts 8 floats of x together one by one. No gather instruction: on AMD's Zen 3 it is slower than
// these single loads (11.4 cycles a step against 5.3). Fillers read a zero that lies behind x.
// Bound: in the cache the 9 loads into vector registers of a step, 1.7 a cycle measured on Zen 3;
// else the memory's rate, since a stored value is 6 bytes that are read once.
// Measured on one thread of a busy Intel machine, 4096 x 4096 with 80, 90 and 95 % zeros, weights
// cold, the least of many interleaved runs: 13 to 15 GB/s of encoded bytes, 0.7 to 1 of the rate at
// which torch sums a buffer of that size, and 4.6, 5.9 and 12 times torch's dense linear.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/target.h"
#include "kernels.h"

SPARSELT_TARGET_BEGIN("avx2,fma,bmi")
#include "cpu/spmv_avx2.h"

namespace sparselt::cpu {

void sell_spmv_avx2(const SpmvCall& call, Range sections) {
  multiply_slices<SellColumns>(call, sections);
}

}  // namespace sparselt::cpu
SPARSELT_TARGET_END

#endif  // __x86_64__
