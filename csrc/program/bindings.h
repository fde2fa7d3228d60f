// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace sparselt {

// Puts the class Program, and what it is tested by, into the Python module.
void bind_program(pybind11::module_& module);

}  // namespace sparselt
