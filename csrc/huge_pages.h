// SPDX-License-Identifier: Apache-2.0
//
// Large pages for large values.
#pragma once

#include <cstddef>

namespace sparselt {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks the system to back the huge pages that lie wholly in [data, data + bytes), those not yet
// touched, by large pages, where it knows such: the allocator gives results of 32 MB and more
// memory of their own at each call, and a page fault for each 4 KB of it takes longer than the
// product. Also, rows of a tile or panel lie on a page each, more than the first-level table of
// translations holds. Does nothing for less than a huge page.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace sparselt
