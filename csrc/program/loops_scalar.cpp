// SPDX-License-Identifier: Apache-2.0
//
// loops.h for any CPU, and the choice between the instruction sets.
#include "cpu_features.h"
#include "program/loop_bodies.h"
#include "program/loops.h"

namespace sparselt {

const Loops kScalarLoops{run_elements, run_affine, run_softmax, run_standardize};

const Loops& loops() {
#if defined(__x86_64__)
  static const Isa isa = current_isa();
  if (isa == Isa::avx512) return kAvx512Loops;
  if (isa == Isa::avx2) return kAvx2Loops;
#endif
  return kScalarLoops;
}

}  // namespace sparselt
