// SPDX-License-Identifier: Apache-2.0
//
// Operator schemas and their CPU implementations (LibTorch stable ABI), and what is no tensor
// (pybind11). Nothing else.
#include "program/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu_features.h"
#include "machine_rates.h"
#include "ops/code_table.h"
#include "ops/ops.h"
#include "program/layers.h"
#include "registry.h"

#define SPARSELT_LAYER "Tensor[] parts, int[] meta, Tensor? bias"
#define SPARSELT_WEIGHT SPARSELT_LAYER ", Tensor? residual"
#define SPARSELT_CONV "int[] stride, int[] padding, int[] dilation, int groups"
#define SPARSELT_CLAMP "float? lower, float? upper, str kernel"

STABLE_TORCH_LIBRARY(sparselt, m) {
  m.def("spmm(Tensor x, " SPARSELT_WEIGHT ", " SPARSELT_CLAMP ") -> Tensor");
  m.def("spmm_out(Tensor x, Tensor(a!) out, " SPARSELT_WEIGHT ", " SPARSELT_CLAMP ") -> ()");
  m.def("linear(Tensor x, " SPARSELT_WEIGHT ", " SPARSELT_CLAMP ") -> Tensor");
  m.def("conv2d(Tensor x, " SPARSELT_WEIGHT ", " SPARSELT_CONV ", " SPARSELT_CLAMP ") -> Tensor");
  m.def("conv2d_out(Tensor x, Tensor(a!) out, " SPARSELT_WEIGHT ", " SPARSELT_CONV
        ", " SPARSELT_CLAMP ") -> ()");
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, " SPARSELT_CLAMP ") -> Tensor");
  m.def("program_linear(int program, int[] values, int batch, " SPARSELT_LAYER ", " SPARSELT_CLAMP
        ") -> ()");
  m.def("program_conv2d(int program, int[] values, int[] x_shape, " SPARSELT_LAYER
        ", " SPARSELT_CONV ", " SPARSELT_CLAMP ") -> ()");
  m.def(
      "program_dense(int program, int[] values, int[] x_shape, Tensor weight, Tensor? "
      "bias, " SPARSELT_CONV ", Tensor? packed) -> ()");
  m.def(
      "program_depthwise(int program, int[] values, int[] x_shape, Tensor weight, Tensor? bias, "
      "int[] stride, int[] padding, int[] dilation, " SPARSELT_CLAMP ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparselt, CPU, m) {
  m.impl("spmm", TORCH_BOX(&sparselt::spmm));
  m.impl("spmm_out", TORCH_BOX(&sparselt::spmm_out));
  m.impl("linear", TORCH_BOX(&sparselt::linear));
  m.impl("conv2d", TORCH_BOX(&sparselt::conv2d));
  m.impl("conv2d_out", TORCH_BOX(&sparselt::conv2d_out));
  m.impl("depthwise_conv2d", TORCH_BOX(&sparselt::depthwise_conv2d));
  m.impl("program_linear", TORCH_BOX(&sparselt::program_linear));
  m.impl("program_conv2d", TORCH_BOX(&sparselt::program_conv2d));
  m.impl("program_dense", TORCH_BOX(&sparselt::program_dense));
  m.impl("program_depthwise", TORCH_BOX(&sparselt::program_depthwise));
}

// A packed weight counts for one of this backend.
STABLE_TORCH_LIBRARY_IMPL(sparselt, MkldnnCPU, m) {
  m.impl("program_dense", TORCH_BOX(&sparselt::program_dense));
}

namespace sparselt {
namespace {

pybind11::list list_kernels() {
  pybind11::list list;
  for (const KernelInfo& kernel : kernels()) {
    pybind11::dict entry;
    const std::string reason = why_unusable(kernel);
    entry["name"] = kernel.name;
    entry["op"] = kernel.op;
    entry["format"] = kernel.format;
    entry["device"] = kernel.device;
    entry["features"] = pybind11::tuple(pybind11::cast(isa_features(kernel.isa)));
    entry["tile_rows"] = kernel.tile_rows;
    entry["tile_columns"] = kernel.tile_columns;
    entry["dtype"] = kernel.dtype;
    entry["usable"] = reason.empty();
    entry["reason"] = reason;
    list.append(entry);
  }
  return list;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
#if defined(__SANITIZE_ADDRESS__)
  info["sanitizer"] = "address";
#else
  info["sanitizer"] = "none";
#endif
  return info;
}

}  // namespace
}  // namespace sparselt

PYBIND11_MODULE(_C, m) {
  sparselt::current_isa();  // an unusable SPARSELT_ISA fails the import, not the first call
  m.def("kernels", &sparselt::list_kernels);
  m.def("cpu_features", &sparselt::cpu_features);
  m.def("isa", [] { return sparselt::isa_name(sparselt::current_isa()); });
  m.def("release_code", &sparselt::release_code);
  m.def("code_bytes", &sparselt::code_bytes);
  m.def("build_info", &sparselt::build_info);
  m.def("multiply_add_rate", &sparselt::multiply_add_rate);
  m.def("read_rate", &sparselt::read_rate);
  sparselt::bind_program(m);
}
