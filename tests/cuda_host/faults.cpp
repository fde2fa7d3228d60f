// SPDX-License-Identifier: Apache-2.0
//
// Kernels with one mistake each, and one without: what the tests of this simulator run. Every one
// shifts x by a place through shared memory, y[i] = x[(i + 1) % 64], with two warps.
#include "faults.h"

#include "cuda/device.cuh"

namespace faults {
namespace {

using namespace sparselt::cuda;

constexpr int kThreads = 64;

enum class Fault {
  kNone,
  kMissingBarrier,    // a neighbour's value is read before it is there
  kMissingWait,       // a background copy is read before it has arrived
  kEarlyOverwrite,    // a background copy starts while the old values are still needed
  kDivergentBarrier,  // only some threads reach a barrier
  kDivergentWarp,     // only some lanes of a warp reach a vote
  kSharedOverrun,     // a write right behind shared memory
  kReadOverrun,       // a read right behind x
  kWriteOverrun,      // a write right behind y
  kMisaligned,        // a 16-byte read from an address that is none
};

template <Fault kFault>
void shift(const SpmmCall call) {
  const float* x = static_cast<const float*>(call.x);
  float* y = static_cast<float*>(call.y);
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  const int from = (i + 1) % kThreads;
  copy_async_4(shared + i, x + i);
  copy_commit();
  if constexpr (kFault != Fault::kMissingWait) copy_wait<0>();
  if constexpr (kFault != Fault::kMissingBarrier) __syncthreads();
  if constexpr (kFault == Fault::kEarlyOverwrite) {
    copy_async_4(shared + i, x + (i + 32) % kThreads);
    copy_commit();
  }
  y[i] = shared[from];
  copy_wait<0>();
  if constexpr (kFault == Fault::kDivergentBarrier) {
    if (i < 40) __syncthreads();
  }
  if constexpr (kFault == Fault::kDivergentWarp) {
    if (i < 40) y[i] += static_cast<float>(__ballot_sync(kFullWarp, false));
  }
  if constexpr (kFault == Fault::kSharedOverrun) shared[i + 1] = 0.0f;
  if constexpr (kFault == Fault::kReadOverrun) y[i] += 0.0f * x[i + 1];
  if constexpr (kFault == Fault::kWriteOverrun) y[i + 1] = 0.0f;
  if constexpr (kFault == Fault::kMisaligned) {
    float four[4];
    load_vector(four, x + i / 8 + 1);
    y[i] += 0.0f * four[0];
  }
}

template <Fault kFault>
cudaError_t start(const SpmmCall& call) {
  return launch(shift<kFault>, 1, kThreads, kThreads * sizeof(float), nullptr, call);
}

struct Named {
  const char* name;
  cudaError_t (*start)(const SpmmCall& call);
};
constexpr Named kFaults[] = {
    {"fault_none", start<Fault::kNone>},
    {"fault_missing_barrier", start<Fault::kMissingBarrier>},
    {"fault_missing_wait", start<Fault::kMissingWait>},
    {"fault_early_overwrite", start<Fault::kEarlyOverwrite>},
    {"fault_divergent_barrier", start<Fault::kDivergentBarrier>},
    {"fault_divergent_warp", start<Fault::kDivergentWarp>},
    {"fault_shared_overrun", start<Fault::kSharedOverrun>},
    {"fault_read_overrun", start<Fault::kReadOverrun>},
    {"fault_write_overrun", start<Fault::kWriteOverrun>},
    {"fault_misaligned", start<Fault::kMisaligned>},
};

}  // namespace

bool is_fault(const std::string& name) { return name.rfind("fault_", 0) == 0; }

cudaError_t run_fault(const std::string& name, const SpmmCall& call) {
  for (const Named& fault : kFaults) {
    if (name == fault.name) return fault.start(call);
  }
  cuda_host::fail("a request for a fault that does not exist");
}

}  // namespace faults
