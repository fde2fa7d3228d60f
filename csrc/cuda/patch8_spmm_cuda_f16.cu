// SPDX-License-Identifier: Apache-2.0
#include "cuda/patch8_spmm.cuh"

namespace sparselt::cuda {

cudaError_t patch8_spmm_cuda_f16(const SpmmCall& call, cudaStream_t stream) {
  return patch8_spmm<__half>(call, stream);
}

}  // namespace sparselt::cuda
