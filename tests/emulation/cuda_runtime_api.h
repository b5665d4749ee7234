// The names of the CUDA runtime that csrc/cuda uses, for the host compiler (emulation). CUTLASS wants the
// toolkit's own.
#pragma once
#ifdef MLPKIT_EMULATED_CUTLASS
#include_next <cuda_runtime_api.h>
#else
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchFailure,
  cudaErrorNoKernelImageForDevice
};
using cudaStream_t = struct CUstream_st*;
struct float2 {
  float x, y;
};
#endif
