// SPDX-License-Identifier: Apache-2.0
//
// What csrc/cuda's operators meet in place of torch's CUDA half, a driver and kernels: devices of
// chosen capabilities, tensors of the CPU that count as tensors on them, and launchers that hand
// their call to Python. The operators' own sources are compiled with these names instead of the
// real ones (tests/cuda_host/operators/__init__.py), and linked with nothing else of CUDA: an
// operator that allocated or waited by itself would not link.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/calls.h"
#include "torch/csrc/stable/c/shim.h"

namespace {

using namespace sparselt::cuda;

constexpr int kCpu = -1;

// One launch, as Python sees it.
struct Launch {
  const char* kernel;
  int64_t device;  // the current one
  void* stream;
  const int64_t* integers;  // as runner.cpp takes them
  int64_t count;
  const void* arrays[kMaxParts + 4];  // parts, x, y, bias, residual
  float* workspace;
  float lower, upper;
};
using OnLaunch = int (*)(const Launch*);

std::vector<int> capabilities;
std::map<const void*, int> places;
int usual_place = kCpu;
int current_device = 0;
OnLaunch on_launch = nullptr;

int place_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  const auto found = places.find(data);
  return found == places.end() ? usual_place : found->second;
}

template <class Call>
cudaError_t hand_over(const char* kernel, const Call& call, const std::vector<int64_t>& own,
                      cudaStream_t stream) {
  const Weight& weight = call.weight;
  std::vector<int64_t> integers{weight.rows, weight.cols, weight.block_rows, weight.block_cols};
  integers.insert(integers.end(), own.begin(), own.end());
  Launch launch{};
  launch.kernel = kernel;
  launch.device = current_device;
  launch.stream = stream;
  launch.integers = integers.data();
  launch.count = static_cast<int64_t>(integers.size());
  std::memcpy(launch.arrays, weight.parts, sizeof(weight.parts));
  const void* others[] = {call.x, call.y, call.epilogue.bias, call.epilogue.residual};
  std::memcpy(launch.arrays + kMaxParts, others, sizeof(others));
  launch.workspace = call.workspace;
  launch.lower = call.epilogue.lower;
  launch.upper = call.epilogue.upper;
  return static_cast<cudaError_t>(on_launch(&launch));
}

cudaError_t hand_over(const char* kernel, const SpmmCall& call, cudaStream_t stream) {
  return hand_over(kernel, call,
                   {call.x_row, call.x_column, call.x_batch, call.y_row, call.y_column,
                    call.y_batch, call.columns, call.batch},
                   stream);
}

cudaError_t hand_over(const char* kernel, const Conv2dCall& call, cudaStream_t stream) {
  return hand_over(kernel, call,
                   {call.batch, call.channels, call.height, call.width, call.out_height,
                    call.out_width, call.kernel_h, call.kernel_w, call.stride_h, call.stride_w,
                    call.padding_h, call.padding_w, call.dilation_h, call.dilation_w, call.groups},
                   stream);
}

}  // namespace

namespace sparselt::cuda {

#define KERNEL_CALL_spmm SpmmCall
#define KERNEL_CALL_conv2d Conv2dCall
#define KERNEL_DEFINE_cpu(name, op)
#define KERNEL_DEFINE_cuda(name, op)                                    \
  cudaError_t name(const KERNEL_CALL_##op& call, cudaStream_t stream) { \
    return hand_over(#name, call, stream);                              \
  }
#define KERNEL(name, op, format, device, ...) KERNEL_DEFINE_##device(name, op)
#include "kernels.inc"
#undef KERNEL

}  // namespace sparselt::cuda

// ---- the driver ----

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= static_cast<int>(capabilities.size())) return cudaErrorInvalidValue;
  const bool major = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = major ? capabilities[device] / 10 : capabilities[device] % 10;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// ---- torch's CUDA half ----

extern "C" {

AOTITorchError cuda_host_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  *type = place_of(tensor) == kCpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError cuda_host_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = place_of(tensor);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError cuda_host_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(current_device));
  current_device = index;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError cuda_host_delete_device_guard(DeviceGuardHandle guard) {
  int* before = reinterpret_cast<int*>(guard);
  current_device = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}
// Another stream for every device, never the default one.
AOTITorchError cuda_host_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(0x1000 + device));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError cuda_host_torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t,
                                                  bool, char** message) {
  if (error != 0) *message = strdup(("CUDA error " + std::to_string(error)).c_str());
  return AOTI_TORCH_SUCCESS;
}
void cuda_host_torch_c10_cuda_free_error_msg(char* message) { free(message); }

// ---- what Python sets ----

void cuda_host_set_devices(const int* found, int count) {
  capabilities.assign(found, found + count);
}
// Tensors that nobody placed, as those that an operator allocates, are on the `usual` device.
void cuda_host_forget_places(int usual) {
  places.clear();
  usual_place = usual;
}
void cuda_host_place(const void* data, int device) { places[data] = device; }
int cuda_host_current_device() { return current_device; }
void cuda_host_on_launch(OnLaunch function) { on_launch = function; }

}  // extern "C"
