// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "registry.h"

namespace sparselt {

// Runs an spmm kernel over the whole product, on torch's threads.
void run_spmm(const KernelInfo& kernel, const SpmmCall& call);

}  // namespace sparselt
