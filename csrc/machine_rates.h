// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

namespace sparselt {

// What the machine can do at best, on all of torch's threads: what kernels' rates are held against.

// GFLOP/s of independent multiply-adds in registers, with the instruction set in use.
double multiply_add_rate();

// GB/s of reading a buffer of `bytes` start to end, each thread its part, again and again.
double read_rate(int64_t bytes);

}  // namespace sparselt
