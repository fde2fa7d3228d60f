// SPDX-License-Identifier: Apache-2.0
#include "cuda/bsr_nhwc_conv2d.cuh"

namespace sparselt::cuda {

cudaError_t bsr_nhwc_conv2d_cuda(const Conv2dCall& call, cudaStream_t stream) {
  return bsr_nhwc_conv2d<float>(call, stream);
}

}  // namespace sparselt::cuda
