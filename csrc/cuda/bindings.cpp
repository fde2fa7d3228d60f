// SPDX-License-Identifier: Apache-2.0
//
// The CUDA half of torch.ops.sparselt (LibTorch stable ABI; ../bindings.cpp defines the schemas and
// must be loaded first), and what is no tensor (pybind11). Nothing else.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"
#include "cuda/registry.h"

STABLE_TORCH_LIBRARY_IMPL(sparselt, CUDA, m) {
  m.impl("spmm", TORCH_BOX(&sparselt::cuda::spmm));
  m.impl("spmm_out", TORCH_BOX(&sparselt::cuda::spmm_out));
  m.impl("linear", TORCH_BOX(&sparselt::cuda::linear));
  m.impl("conv2d", TORCH_BOX(&sparselt::cuda::conv2d));
  m.impl("conv2d_out", TORCH_BOX(&sparselt::cuda::conv2d_out));
}

PYBIND11_MODULE(_C_cuda, m) {
  // Why kernels for an instruction set ("sm80") cannot run on a device; empty where they can.
  m.def("why_unusable", &sparselt::cuda::why_unusable);
  m.def("runtime_version", [] {
    int version = 0;  // 1000 * major + 10 * minor
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
  });
}
