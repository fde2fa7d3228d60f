// SPDX-License-Identifier: Apache-2.0
#include "cuda/patch8_spmm.cuh"

namespace sparselt::cuda {

cudaError_t patch8_spmm_cuda_bf16(const SpmmCall& call, cudaStream_t stream) {
  return patch8_spmm<__nv_bfloat16>(call, stream);
}

}  // namespace sparselt::cuda
