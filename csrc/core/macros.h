// What every file of core needs: host+device marking, and a namespace that differs for each instruction set, so that
// the linker can never hand the AVX-512 copy of an inline function to a machine without AVX-512.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MLPKIT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MLPKIT_HD inline __attribute__((always_inline))
#else
#define MLPKIT_HD inline
#endif

#ifndef MLPKIT_ISA
#if defined(__CUDACC__)
#define MLPKIT_ISA isa_cuda
#else
#define MLPKIT_ISA isa_host
#endif
#endif

#define MLPKIT_BEGIN_ISA \
  namespace mlpkit {     \
  inline namespace MLPKIT_ISA {
#define MLPKIT_END_ISA \
  }                    \
  }
