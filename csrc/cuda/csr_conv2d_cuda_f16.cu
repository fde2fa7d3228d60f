// SPDX-License-Identifier: Apache-2.0
#include "cuda/csr_conv2d.cuh"

namespace sparselt::cuda {

cudaError_t csr_conv2d_cuda_f16(const Conv2dCall& call, cudaStream_t stream) {
  return csr_conv2d<__half>(call, csr_spmm_cuda_f16, stream);
}

}  // namespace sparselt::cuda
