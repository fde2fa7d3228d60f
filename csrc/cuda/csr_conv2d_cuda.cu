// SPDX-License-Identifier: Apache-2.0
#include "cuda/csr_conv2d.cuh"

namespace sparselt::cuda {

cudaError_t csr_conv2d_cuda(const Conv2dCall& call, cudaStream_t stream) {
  return csr_conv2d<float>(call, csr_spmm_cuda, stream);
}

}  // namespace sparselt::cuda
