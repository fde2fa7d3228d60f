// SPDX-License-Identifier: Apache-2.0
#include "cuda/csr_conv2d.cuh"

namespace sparselt::cuda {

cudaError_t csr_conv2d_cuda_bf16(const Conv2dCall& call, cudaStream_t stream) {
  return csr_conv2d<__nv_bfloat16>(call, csr_spmm_cuda_bf16, stream);
}

}  // namespace sparselt::cuda
