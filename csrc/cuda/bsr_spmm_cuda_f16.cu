// SPDX-License-Identifier: Apache-2.0
#include "cuda/bsr_spmm.cuh"

namespace sparselt::cuda {

cudaError_t bsr_spmm_cuda_f16(const SpmmCall& call, cudaStream_t stream) {
  return bsr_spmm<__half>(call, csr_spmm_cuda_f16, bsr_nhwc_conv2d_cuda_f16, stream);
}

}  // namespace sparselt::cuda
