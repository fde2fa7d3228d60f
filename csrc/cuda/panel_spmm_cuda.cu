// SPDX-License-Identifier: Apache-2.0
#include "cuda/panel_spmm.cuh"

namespace sparselt::cuda {

cudaError_t panel_spmm_cuda(const SpmmCall& call, cudaStream_t stream) {
  return panel_spmm<float>(call, stream);
}

}  // namespace sparselt::cuda
