// SPDX-License-Identifier: Apache-2.0
#include "cuda/bitmask_spmm.cuh"

namespace sparselt::cuda {

cudaError_t bitmask_spmm_cuda_f16(const SpmmCall& call, cudaStream_t stream) {
  return bitmask_spmm<__half>(call, stream);
}

}  // namespace sparselt::cuda
