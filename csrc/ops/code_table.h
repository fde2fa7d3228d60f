// SPDX-License-Identifier: Apache-2.0
//
// The code generated for packed weights, made at a weight's first use and shared by all later ones.
#pragma once

#include <memory>

#include "jit/panel_code.h"
#include "ops/ops.h"

namespace sparselt {

// The code for the SELL weight of these parts. While the table holds it, it holds the memory that
// it was made from too, so that no address can come to mean another weight.
std::shared_ptr<const jit::PanelCode> code_for(const Parts& parts, const SellView& view);

// Drops the code of the weight whose slice_steps lie at this address, if there is any; a later use
// makes it again. Called when that tensor dies.
void release_code(uintptr_t slice_steps);

// Bytes of the code of that weight; 0 where it has none.
size_t code_bytes(uintptr_t slice_steps);

}  // namespace sparselt
