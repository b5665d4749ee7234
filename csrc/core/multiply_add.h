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

// x / by, rounded once, for x of 0, Inf, NaN or within 2^-80 and 2^80; inverse: 1 / by rounded, for by within 2^-40 and
// 2^40, or 0: not known. Product, exact remainder and its correction are what a division costs the less (Brisebarre,
// Muller, Raina: "Accelerating correctly rounded floating-point division when the divisor is known in advance", 2004).
template <class F, class R>
MLPKIT_HD F divided(F x, R by, [[maybe_unused]] R inverse) {
#if defined(__FMA__)
  if constexpr (sizeof(R) == sizeof(float)) {
    if (inverse != 0) {
      const F quotient = x * inverse, y = splat<F>(inverse);
      const F rest = multiply_add(-quotient, splat<F>(by), x);
      return x <= 0x1.fffffep127f ? multiply_add(rest, y, quotient) : x;
    }
  }
#endif
  return x / by;
}

}  // namespace math
MLPKIT_END_ISA
