// SPDX-License-Identifier: Apache-2.0
#include "cuda/panel_spmm.cuh"

namespace sparselt::cuda {

cudaError_t panel_spmm_cuda_f16(const SpmmCall& call, cudaStream_t stream) {
  return panel_spmm<__half>(call, stream);
}

}  // namespace sparselt::cuda
