// a b + c, rounded once where the processor can, for formulas that say themselves what is contracted (core; host and
// device).
#pragma once
#include "core/math.h"

MLPKIT_BEGIN_ISA
namespace math {

template <>
struct SquareRoot<double> {
  MLPKIT_HD static double of(double x) { return ::sqrt(x); }
};

// SIMD vector types add their own specialisation.
template <class F>
struct MultiplyAdd {
  MLPKIT_HD static F of(F a, F b, F c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
    if constexpr (sizeof(F) == sizeof(float)) return ::fmaf(a, b, c);
    return ::fma(a, b, c);
#else
    return a * b + c;
#endif
  }
};
template <class F>
MLPKIT_HD F multiply_add(F a, F b, F c) {
  return MultiplyAdd<F>::of(a, b, c);
}

// x in every lane.
template <class F, class R>
MLPKIT_HD F splat(R x) {
  return F{} + x;
}

}  // namespace math
MLPKIT_END_ISA
