// What the formulas of core/optimizer.h ask of vectors: doubles, and a b + c rounded once (cpu). Included by
// *_kernel.cpp files only.
#pragma once
#include "core/multiply_add.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

typedef double DoubleVec __attribute__((vector_size(kLanes * 4)));

namespace math {

template <>
struct SquareRoot<DoubleVec> {
  MLPKIT_HD static DoubleVec of(DoubleVec x) {
    for (int i = 0; i < kLanes / 2; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
  }
};

template <>
struct MultiplyAdd<FloatVec> {
  MLPKIT_HD static FloatVec of(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
    return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
  }
};
template <>
struct MultiplyAdd<DoubleVec> {
  MLPKIT_HD static DoubleVec of(DoubleVec a, DoubleVec b, DoubleVec c) {
#if defined(__AVX512F__)
    return (DoubleVec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (DoubleVec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
  }
};

}  // namespace math
MLPKIT_END_ISA
