// SPDX-License-Identifier: Apache-2.0
//
// Opens and closes the region of a file that is compiled for an instruction set, so that no unit
// needs flags of its own and nothing outside the region (a shared inline function, say) is ever
// compiled for a CPU that the user may not have. System headers are included before the region;
// lambdas, standard templates and namespace-scope SIMD constants stay out of it.
//
// SPARSELT_UNROLL before a loop of constant length that indexes an array of vectors: a loop left
// standing would keep the array in memory, where every access is a load or a store.
#pragma once

#define SPARSELT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPARSELT_TARGET_BEGIN(isa) \
  SPARSELT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SPARSELT_TARGET_END SPARSELT_PRAGMA(clang attribute pop)
#define SPARSELT_UNROLL SPARSELT_PRAGMA(unroll)
#else
#define SPARSELT_TARGET_BEGIN(isa) \
  SPARSELT_PRAGMA(GCC push_options) SPARSELT_PRAGMA(GCC target(isa))
#define SPARSELT_TARGET_END SPARSELT_PRAGMA(GCC pop_options)
#define SPARSELT_UNROLL SPARSELT_PRAGMA(GCC unroll 16)
#endif
