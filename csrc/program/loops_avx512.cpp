// SPDX-License-Identifier: Apache-2.0
//
// loops.h for AVX-512.
#if defined(__x86_64__)
#include "cpu/target.h"
#include "program/loops.h"

SPARSELT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "program/loop_bodies.h"
SPARSELT_TARGET_END

namespace sparselt {

const Loops kAvx512Loops{run_elements, run_affine, run_softmax, run_standardize};

}  // namespace sparselt
#endif
