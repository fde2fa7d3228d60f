// SPDX-License-Identifier: Apache-2.0
#include "program/bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "program/glue.h"
#include "program/image_glue.h"
#include "program/memory.h"
#include "program/program.h"

namespace sparselt {
namespace {

using Addresses = std::vector<uintptr_t>;

std::vector<float*> as_floats(const Addresses& addresses) {
  std::vector<float*> pointers;
  pointers.reserve(addresses.size());
  for (const uintptr_t address : addresses) pointers.push_back(reinterpret_cast<float*>(address));
  return pointers;
}

std::vector<const float*> as_const_floats(const Addresses& addresses) {
  const std::vector<float*> pointers = as_floats(addresses);
  return {pointers.begin(), pointers.end()};
}

void run(const Program& program, const Addresses& inputs, const Addresses& outputs) {
  program.run(as_const_floats(inputs), as_floats(outputs));
}

// Of a program with one of each.
void run_one(const Program& program, uintptr_t input, uintptr_t output) {
  program.run({reinterpret_cast<const float*>(input)}, {reinterpret_cast<float*>(output)});
}

using Stretches = std::vector<std::pair<uintptr_t, int64_t>>;

template <class T>
std::vector<Samples<T>> as_samples(const Stretches& stretches) {
  std::vector<Samples<T>> samples;
  samples.reserve(stretches.size());
  for (const auto& [first, step] : stretches)
    samples.push_back({reinterpret_cast<T*>(first), step});
  return samples;
}

void run_each(const Program& program, const Stretches& inputs, const Stretches& outputs,
              int64_t count, bool apart) {
  program.run_each(as_samples<const float>(inputs), as_samples<float>(outputs), count, apart);
}

std::vector<std::pair<int64_t, int64_t>> run_watched(const Program& program,
                                                     const Addresses& inputs,
                                                     const Addresses& outputs) {
  std::vector<std::pair<int64_t, int64_t>> spans;
  for (const Span& span : program.run_watched(as_const_floats(inputs), as_floats(outputs))) {
    spans.emplace_back(span.begin, span.end);
  }
  return spans;
}

Element element_of(const std::string& name) {
  if (name == "identity") return Element::kIdentity;
  if (name == "add") return Element::kAdd;
  if (name == "mul") return Element::kMultiply;
  if (name == "sigmoid") return Element::kSigmoid;
  if (name == "silu") return Element::kSilu;
  if (name == "gelu") return Element::kGelu;
  if (name == "hardswish") return Element::kHardswish;
  throw std::invalid_argument("element: there is none called " + name);
}

void add_elements(Program& program, const std::string& name, int64_t x, int64_t residual, int64_t y,
                  int64_t floats, float lower, float upper) {
  program.add_task(make_element_task(program.team(), element_of(name), floats, lower, upper),
                   {x, residual, y},
                   make_image_elements(program.team(), element_of(name), lower, upper));
}

void add_copy(Program& program, int64_t x, int64_t y, int64_t rows, int64_t floats,
              int64_t x_stride, int64_t y_stride) {
  program.add_task(make_copy_task(program.team(), rows, floats, x_stride, y_stride), {x, -1, y});
}

void add_affine(Program& program, int64_t x, int64_t y, int64_t batch, int64_t channels,
                int64_t area, uintptr_t scale, uintptr_t shift, float lower, float upper) {
  program.add_task(
      make_affine_task(program.team(), batch, channels, area, reinterpret_cast<float*>(scale),
                       reinterpret_cast<float*>(shift), lower, upper),
      {x, -1, y});
}

void add_broadcast(Program& program, const std::string& name, int64_t x, int64_t z, int64_t y,
                   int64_t outer, int64_t period, int64_t inner) {
  program.add_task(make_broadcast_task(program.team(), element_of(name), outer, period, inner),
                   {x, z, y});
}

void add_gather(Program& program, int64_t x, int64_t y, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& strides) {
  program.add_task(make_gather_task(program.team(), sizes, strides), {x, -1, y});
}

void add_softmax(Program& program, int64_t x, int64_t y, int64_t rows, int64_t floats) {
  program.add_task(make_softmax_task(program.team(), rows, floats), {x, -1, y});
}

void add_standardize(Program& program, int64_t x, int64_t z, int64_t y, int64_t rows,
                     int64_t floats, float epsilon) {
  program.add_task(make_standardize_task(program.team(), rows, floats, epsilon), {x, z, y});
}

// The sizes, kernel, stride and padding of both axes.
using Window = std::vector<int64_t>;

Axis axis_of(const Window& window, size_t axis) {
  return {window.at(axis), window.at(2 + axis), window.at(4 + axis), window.at(6 + axis), 1};
}

void add_max_pool(Program& program, int64_t x, int64_t y, int64_t planes, const Window& window) {
  const Axis h = axis_of(window, 0);
  const Axis w = axis_of(window, 1);
  program.add_task(make_max_pool_task(program.team(), planes, h, w), {x, -1, y},
                   make_image_max_pool(program.team(), h, w));
}

void add_mean_pool(Program& program, int64_t x, int64_t y, int64_t planes, const Window& window,
                   bool count_padding) {
  const Axis h = axis_of(window, 0);
  const Axis w = axis_of(window, 1);
  program.add_task(make_mean_pool_task(program.team(), planes, h, w, count_padding), {x, -1, y},
                   make_image_mean_pool(program.team(), h, w, count_padding));
}

void add_mean(Program& program, int64_t x, int64_t y, int64_t rows, int64_t floats) {
  program.add_task(make_mean_task(program.team(), rows, floats), {x, -1, y},
                   make_image_mean(program.team(), floats));
}

std::pair<std::vector<int64_t>, int64_t> plan(
    const std::vector<std::tuple<int64_t, int64_t, int64_t>>& given) {
  std::vector<Block> blocks;
  for (const auto& [floats, first, last] : given) blocks.push_back({floats, first, last});
  const MemoryPlan plan = plan_memory(blocks);
  return {plan.offsets, plan.floats};
}

}  // namespace

void bind_program(pybind11::module_& module) {
  using Release = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<ArenaPool, std::shared_ptr<ArenaPool>>(module, "ArenaPool")
      .def(pybind11::init<>())
      .def_property_readonly("allocations", &ArenaPool::allocations);
  pybind11::class_<Program>(module, "Program")
      .def(pybind11::init<int64_t, std::shared_ptr<ArenaPool>, bool>(), pybind11::arg("threads"),
           pybind11::arg("pool"), pybind11::arg("images_innermost") = false)
      .def_property_readonly("handle", &Program::handle)
      .def_property_readonly("arena_floats", &Program::arena_floats)
      .def_property_readonly("num_in_panels", &Program::num_in_panels)
      .def_property_readonly("images_innermost", &Program::images_innermost)
      .def_property_readonly("num_in_images", &Program::num_in_images)
      .def_property_readonly("num_turns", &Program::num_turns)
      .def_property_readonly("num_steps", &Program::num_steps)
      .def_property_readonly("has_parts", &Program::has_parts)
      .def("add_input", &Program::add_input)
      .def("add_constant",
           [](Program& program, uintptr_t address, int64_t floats) {
             return program.add_constant(reinterpret_cast<const float*>(address), floats);
           })
      .def("add_value", &Program::add_value)
      .def("add_part", &Program::add_part)
      .def("lay_in", &Program::lay_in)
      .def("add_output", &Program::add_output)
      .def("add_elements", &add_elements)
      .def("add_copy", &add_copy)
      .def("add_affine", &add_affine)
      .def("add_broadcast", &add_broadcast)
      .def("add_gather", &add_gather)
      .def("add_softmax", &add_softmax)
      .def("add_standardize", &add_standardize)
      .def("add_max_pool", &add_max_pool)
      .def("add_mean_pool", &add_mean_pool)
      .def("add_mean", &add_mean)
      .def("finish", &Program::finish)
      .def("set_parallel", &Program::set_parallel)
      .def("run", &run, Release())
      .def("run_one", &run_one, Release())
      .def("run_each", &run_each, Release())
      .def("run_watched", &run_watched, Release());
  module.def("plan_memory", &plan);
}

}  // namespace sparselt
