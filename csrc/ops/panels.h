// SPDX-License-Identifier: Apache-2.0
//
// Cuts a product or a convolution into the panels that a panel kernel computes, and runs them.
#pragma once

#include "ops/check.h"
#include "ops/panel_maker.h"

namespace sparselt {

// y, and the residual, are (batch, rows, out_height, out_width), contiguous.
void run_panels(const Weight& weight, const PanelSource& source, float* y,
                const Epilogue& epilogue);

}  // namespace sparselt
