// SPDX-License-Identifier: Apache-2.0
#include "cuda/tile8_spmm.cuh"

namespace sparselt::cuda {

cudaError_t tile8_spmm_cuda(const SpmmCall& call, cudaStream_t stream) {
  return tile8_spmm<float>(call, stream);
}

}  // namespace sparselt::cuda
