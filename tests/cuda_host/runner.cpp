// SPDX-License-Identifier: Apache-2.0
//
// Runs registered CUDA kernels by name on this CPU, one request after the other, from standard
// input to standard output.
//
//   request    a line "kernel schedule workspace" (1: the call gets one), a line of the call's
//   integers, a line "lower upper" of floats, a line of pairs
//              "bytes offset" for each of the weight's 4 parts, x, y, bias and residual (-1 0:
//              absent); then the bytes of all that are present but y. `offset` bytes is how far
//              past a 256-byte boundary the array starts.
//   answer     a line with the launcher's result; where that is 0, the bytes of y
//
// Integers of an spmm call: rows cols block_rows block_cols x_row x_column x_batch y_row y_column
// y_batch columns batch; of a conv2d call: rows cols block_rows block_cols, then the fields of
// Conv2dCall in their order.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/calls.h"
#include "cuda/split_plan.h"
#include "faults.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define UNPOISON(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define POISON(address, bytes) ((void)(address), (void)(bytes))
#define UNPOISON(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace {

using namespace sparselt::cuda;

constexpr size_t kAlignment = 256;
constexpr size_t kGuardBytes = 256;  // of NaN around an array
constexpr unsigned char kGuard = 0xff;

enum ArrayName { kX = kMaxParts, kY, kBias, kResidual, kArrays };

// One array of a request, exactly as large as its bytes: what lies around it is poisoned or
// guarded.
struct Array {
  unsigned char* allocation = nullptr;
  unsigned char* data = nullptr;
  size_t bytes = 0;
  size_t before = 0;

  Array(size_t size, size_t offset) : bytes(size), before(kAlignment + offset) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, before + bytes + kGuardBytes) != 0)
      cuda_host::fail("no memory for an array");
    allocation = static_cast<unsigned char*>(memory);
    data = allocation + before;
    std::memset(allocation, kGuard, before + bytes + kGuardBytes);
    POISON(allocation, before);
    POISON(data + bytes, kGuardBytes);
  }
  ~Array() {
    UNPOISON(allocation, before + bytes + kGuardBytes);
    for (size_t i = 0; i < before; ++i) check(allocation[i]);
    for (size_t i = 0; i < kGuardBytes; ++i) check(data[bytes + i]);
    std::free(allocation);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  static void check(unsigned char byte) {
    if (byte != kGuard) cuda_host::fail("wrote outside an array in global memory");
  }
};

std::vector<int64_t> read_integers() {
  std::string line;
  std::getline(std::cin, line);
  std::istringstream words(line);
  std::vector<int64_t> integers;
  for (int64_t value; words >> value;) integers.push_back(value);
  return integers;
}

using Arrays = std::vector<std::unique_ptr<Array>>;

Arrays read_arrays() {
  const std::vector<int64_t> sizes = read_integers();
  if (sizes.size() != 2 * kArrays) cuda_host::fail("a request with the wrong number of arrays");
  Arrays arrays;
  for (size_t i = 0; i < kArrays; ++i) {
    const bool present = sizes[2 * i] >= 0;
    arrays.push_back(present ? std::make_unique<Array>(sizes[2 * i], sizes[2 * i + 1]) : nullptr);
    if (present && i != kY) std::cin.read(reinterpret_cast<char*>(arrays[i]->data), sizes[2 * i]);
  }
  return arrays;
}

unsigned char* data(const Arrays& arrays, size_t i) {
  return arrays[i] ? arrays[i]->data : nullptr;
}

// What a request gives beside the fields of a call.
struct Request {
  std::vector<int64_t> integers;
  std::vector<float> limits;
  Arrays arrays;
  bool with_workspace = false;
};

template <class Call>
void fill_common(Call& call, const Request& request, std::string_view format) {
  const std::vector<int64_t>& n = request.integers;
  const Arrays& arrays = request.arrays;
  for (size_t i = 0; i < kMaxParts; ++i) call.weight.parts[i] = data(arrays, i);
  call.weight.rows = n[0];
  call.weight.cols = n[1];
  call.weight.block_rows = n[2];
  call.weight.block_cols = n[3];
  call.weight.index_size = format == "bsr_nhwc" ? 2 : 1;
  if (arrays[1])
    call.weight.stored = static_cast<int64_t>(arrays[1]->bytes / 4) / call.weight.index_size;
  call.x = data(arrays, kX);
  call.y = data(arrays, kY);
  call.epilogue = {data(arrays, kBias), data(arrays, kResidual), request.limits[0],
                   request.limits[1]};
}

SpmmCall spmm_call(const Request& request, std::string_view format) {
  const std::vector<int64_t>& n = request.integers;
  SpmmCall call{};
  fill_common(call, request, format);
  call.x_row = n.at(4), call.x_column = n.at(5), call.x_batch = n.at(6);
  call.y_row = n.at(7), call.y_column = n.at(8), call.y_batch = n.at(9);
  call.columns = n.at(10), call.batch = n.at(11);
  return call;
}

// With a workspace of the size asked for, if any, full of NaN.
template <class Launcher, class Call>
cudaError_t start(Launcher launcher, Call call, const Request& request, std::string_view format,
                  size_t element) {
  const int64_t floats = request.with_workspace ? workspace_floats(format, call, element) : 0;
  if (floats == 0) return launcher(call, nullptr);
  const Array workspace(static_cast<size_t>(floats) * sizeof(float), 0);
  std::memset(workspace.data, kGuard, workspace.bytes);
  call.workspace = reinterpret_cast<float*>(workspace.data);
  return launcher(call, nullptr);
}

cudaError_t start(SpmmLauncher launcher, const Request& request, std::string_view format,
                  size_t element) {
  return start(launcher, spmm_call(request, format), request, format, element);
}

cudaError_t start(Conv2dLauncher launcher, const Request& request, std::string_view format,
                  size_t element) {
  const std::vector<int64_t>& n = request.integers;
  Conv2dCall call{};
  fill_common(call, request, format);
  call.batch = n.at(4), call.channels = n.at(5), call.height = n.at(6), call.width = n.at(7);
  call.out_height = n.at(8), call.out_width = n.at(9), call.kernel_h = n.at(10),
  call.kernel_w = n.at(11);
  call.stride_h = n.at(12), call.stride_w = n.at(13), call.padding_h = n.at(14),
  call.padding_w = n.at(15);
  call.dilation_h = n.at(16), call.dilation_w = n.at(17), call.groups = n.at(18);
  return start(launcher, call, request, format, element);
}

constexpr size_t element_bytes(std::string_view dtype) { return dtype == "float32" ? 4 : 2; }

cudaError_t run(const std::string& name, const Request& request) {
  if (faults::is_fault(name)) return faults::run_fault(name, spmm_call(request, "csr"));
#define START_cpu(kernel, format, dtype)
#define START_cuda(kernel, format, dtype) \
  if (name == #kernel) return start(&kernel, request, #format, element_bytes(#dtype));
#define KERNEL(kernel, op, format, device, isa, tile_rows, tile_columns, dtype) \
  START_##device(kernel, format, dtype)
#include "kernels.inc"
#undef KERNEL
#undef START_cuda
#undef START_cpu
  cuda_host::fail("a request for a kernel that is not registered");
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string name;
    unsigned schedule = 0;
    Request request;
    words >> name >> schedule >> request.with_workspace;
    request.integers = read_integers();
    std::getline(std::cin, line);
    // strtof and not >>: the latter knows no infinities.
    for (char* rest = line.data(); request.limits.size() < 2;)
      request.limits.push_back(std::strtof(rest, &rest));
    request.arrays = read_arrays();
    cuda_host::set_schedule(schedule);
    const cudaError_t result = run(name, request);
    std::cout << static_cast<int>(result) << '\n';
    if (result == cudaSuccess) {
      std::cout.write(reinterpret_cast<const char*>(request.arrays[kY]->data),
                      static_cast<std::streamsize>(request.arrays[kY]->bytes));
    }
    std::cout.flush();
  }
  return 0;
}
