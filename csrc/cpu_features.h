// SPDX-License-Identifier: Apache-2.0
//
// Instruction sets: which one a kernel needs, and which ones this process may use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace sparselt {

// sm80: not a CPU level, but what a CUDA kernel's registry line asks for.
enum class Isa { scalar, avx2, avx512, neon, sm80 };

std::string_view isa_name(Isa isa);

// The CPU features that a level stands for, in the CPU's own words.
std::vector<std::string_view> isa_features(Isa isa);

// The highest level in use: the CPU's, or the one that the environment variable SPARSELT_ISA names.
// Read once, at load. Throws where SPARSELT_ISA names a level that this CPU or this build does not
// have.
Isa current_isa();

// Empty where kernels of this level may run; otherwise the reason why not.
std::string why_unsupported(Isa isa);

// The features of this CPU that any kernel asks for.
std::vector<std::string_view> cpu_features();

}  // namespace sparselt
