// SPDX-License-Identifier: Apache-2.0
#include "cuda/csr_spmm.cuh"

namespace sparselt::cuda {

cudaError_t csr_spmm_cuda_f16(const SpmmCall& call, cudaStream_t stream) {
  return csr_spmm<__half>(call, stream);
}

}  // namespace sparselt::cuda
