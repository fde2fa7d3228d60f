// SPDX-License-Identifier: Apache-2.0
//
// loops.h for AVX2.
#if defined(__x86_64__)
#include "cpu/target.h"
#include "program/loops.h"

SPARSELT_TARGET_BEGIN("avx2,fma")
#include "program/loop_bodies.h"
SPARSELT_TARGET_END

namespace sparselt {

const Loops kAvx2Loops{run_elements, run_affine, run_softmax, run_standardize};

}  // namespace sparselt
#endif
