// SPDX-License-Identifier: Apache-2.0
#include "cuda/bsr_spmm.cuh"

namespace sparselt::cuda {

cudaError_t bsr_spmm_cuda(const SpmmCall& call, cudaStream_t stream) {
  return bsr_spmm<float>(call, csr_spmm_cuda, bsr_nhwc_conv2d_cuda, stream);
}

}  // namespace sparselt::cuda
