// SPDX-License-Identifier: Apache-2.0
#include "cuda/csr_spmm.cuh"

namespace sparselt::cuda {

cudaError_t csr_spmm_cuda(const SpmmCall& call, cudaStream_t stream) {
  return csr_spmm<float>(call, stream);
}

}  // namespace sparselt::cuda
