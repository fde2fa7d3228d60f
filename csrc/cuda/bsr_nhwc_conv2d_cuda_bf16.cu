// SPDX-License-Identifier: Apache-2.0
#include "cuda/bsr_nhwc_conv2d.cuh"

namespace sparselt::cuda {

cudaError_t bsr_nhwc_conv2d_cuda_bf16(const Conv2dCall& call, cudaStream_t stream) {
  return bsr_nhwc_conv2d<__nv_bfloat16>(call, stream);
}

}  // namespace sparselt::cuda
