// SPDX-License-Identifier: Apache-2.0
#include "cuda/panel_spmm.cuh"

namespace sparselt::cuda {

cudaError_t panel_spmm_cuda_bf16(const SpmmCall& call, cudaStream_t stream) {
  return panel_spmm<__nv_bfloat16>(call, stream);
}

}  // namespace sparselt::cuda
