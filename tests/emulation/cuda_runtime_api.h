// The names of the CUDA runtime that csrc/cuda uses, for the host compiler (emulation).
#pragma once
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
