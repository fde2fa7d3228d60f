// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "cuda/calls.h"

namespace faults {

bool is_fault(const std::string& name);

// Runs the kernel of faults.cpp called `name` on the call's x and y of 64 floats.
cudaError_t run_fault(const std::string& name, const sparselt::cuda::SpmmCall& call);

}  // namespace faults
