// Elementary functions, written once for a float, a double or a SIMD vector of floats (core; host and device).
// The float versions are plain polynomials without branches or tables, so the same text vectorises and runs on a GPU;
// each errs by less than 2 ulp of its result, Phi as said there. NaN stays NaN and overflow becomes Inf.
#pragma once
#include <math.h>
#include <string.h>

#include "core/macros.h"

MLPKIT_BEGIN_ISA
namespace math {

// The integer type that holds the bits of F, lane by lane. SIMD vector types add their own specialisation.
template <class F>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};

// A real constant in the precision of F: full for double, float for everything else.
template <class F>
struct Scalar {
  using type = float;
};
template <>
struct Scalar<double> {
  using type = double;
};
template <class F>
MLPKIT_HD constexpr typename Scalar<F>::type constant(double value) {
  return static_cast<typename Scalar<F>::type>(value);
}

template <class To, class From>
MLPKIT_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class F>
MLPKIT_HD F absolute(F x) {
  using I = typename IntOf<F>::type;
  return bits_as<F>(bits_as<I>(x) & 0x7fffffff);
}

// The square root, correctly rounded. SIMD vector types add their own specialisation.
template <class F>
struct SquareRoot {
  MLPKIT_HD static F of(F x) { return ::sqrtf(x); }
};
template <class F>
MLPKIT_HD F sqrt(F x) {
  return SquareRoot<F>::of(x);
}

// exp(x) = 2^n exp(r),  n = round(x / ln 2),  |r| <= ln(2) / 2. `shifted` is n plus 1.5 * 2^23, whose low bits are n as
// an integer.
template <class F>
MLPKIT_HD F exp_of_rest(F r) {
  F q = r * 0.0013814429f + 0.0083687971f;
  q = q * r + 0.0416683959f;
  q = q * r + 0.1666651997f;
  q = q * r + 0.4999999340f;
  return (q * r) * r + r + 1.f;
}
template <class F>
MLPKIT_HD F exp(F x) {
  using I = typename IntOf<F>::type;
  const F high = x > 89.f ? 89.f : x;
  const F clamped = high < -104.f ? -104.f : high;
  const F shifted = clamped * 1.44269504f + 12582912.f;
  const F n = shifted - 12582912.f;
  const F p = exp_of_rest((clamped - n * 0.693359375f) + n * 2.12194440e-4f);
  const I whole = bits_as<I>(shifted) - 0x4b400000;
  const I half = whole >> 1;
  const F result = p * bits_as<F>((half + 127) << 23) * bits_as<F>((whole - half + 127) << 23);
  return x > 89.f ? x * 3.0e38f : (x < -104.f ? 0.f : result);
}
MLPKIT_HD double exp(double x) { return ::exp(x); }

// log(m) = 2 atanh(s),  s = (m - 1) / (m + 1),  as s (2 + s^2 L(s^2)) for |s| <= 1/3
template <class F>
MLPKIT_HD F log_of_ratio(F s) {
  const F t = s * s;
  F q = t * 0.23244251f + 0.21702312f;
  q = q * t + 0.28592643f;
  q = q * t + 0.399996996f;
  q = q * t + 0.666666687f;
  return s * (2.f + t * q);
}
// log(1 + x) for 0 <= x <= 1: nothing is lost where 1 + x would round to 1.
template <class F>
MLPKIT_HD F log1p_up_to_1(F x) {
  return log_of_ratio(x / (2.f + x));
}
// log(x) = n ln 2 + log(m),  x = 2^n m,  sqrt(1/2) <= m < sqrt(2). `shifted` is n plus 1.5 * 2^23 as bits.
template <class F>
MLPKIT_HD F log(F x) {
  using I = typename IntOf<F>::type;
  const F subnormal = x < 1.17549435e-38f ? F{} + 1.f : F{};
  const F normal = x * (1.f + subnormal * 8388607.f);
  const I bits = bits_as<I>(normal) - 0x3f3504f3;
  const F n = (bits_as<F>((bits >> 23) + 0x4b400000) - 12582912.f) - subnormal * 23.f;
  const F m = bits_as<F>((bits & 0x7fffff) + 0x3f3504f3);
  const F inside = n * 0.693359375f + (log_of_ratio((m - 1.f) / (m + 1.f)) - n * 2.12194440e-4f);
  constexpr float infinity = __builtin_inff();
  const F positive = x < infinity ? inside : x;
  return x > 0.f ? positive : (x < 0.f ? F{} + __builtin_nanf("") : (x == 0.f ? F{} - infinity : x));
}

// tanh(x) = x + x^3 T(x^2) near 0,  sign(x) (1 - 2 / (exp(2|x|) + 1)) elsewhere
template <class F>
MLPKIT_HD F tanh(F x) {
  const F a = absolute(x);
  const F t = x * x;
  F s = t * 0.000120391873f - 0.000836785766f;
  s = s * t + 0.00307145878f;
  s = s * t - 0.00858901907f;
  s = s * t + 0.0217818469f;
  s = s * t - 0.0539523624f;
  s = s * t + 0.13333191f;
  s = s * t - 0.333333284f;
  const F small = (s * t) * x + x;
  const F large = 1.f - 2.f / (exp(a + a) + 1.f);
  return a < 1.f ? small : (x < 0.f ? -large : large);
}
MLPKIT_HD double tanh(double x) { return ::tanh(x); }

// sigmoid(x) = 1 / (1 + exp(-x))
template <class F>
MLPKIT_HD F sigmoid(F x) {
  return 1.f / (1.f + exp(-x));
}
MLPKIT_HD double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

// exp(-b^2 / 2) = 2^n 2^f,  n = round(-b^2 / (2 ln 2)),  |f| <= 1/2, for 0 <= b <= 13, where nothing can overflow or
// become subnormal. The rounding of b^2 is its largest error: 2e-7 of the result up to 1.5, but 8e-6 at 13.
template <class F>
MLPKIT_HD F bell_up_to_13(F b) {
  using I = typename IntOf<F>::type;
  constexpr float per_square = -0.721347520f;
  const F square = b * b;
  const F shifted = square * per_square + 12582912.f;
  const F f = square * per_square - (shifted - 12582912.f);
  F p = f * 1.5345811e-4f + 1.3399935e-3f;
  p = p * f + 9.6184890e-3f;
  p = p * f + 5.5503288e-2f;
  p = p * f + 2.4022647e-1f;
  p = p * f + 6.9314721e-1f;
  p = p * f + 1.f;
  return bits_as<F>(bits_as<I>(p) + (bits_as<I>(shifted) << 23));
}

// The standard normal distribution at x: bell = exp(-x^2 / 2), Phi(x) = (1 + erf(x / sqrt 2)) / 2, and x Phi(x), which
// is nearer as max(x, 0) - |x| Phi(-|x|) than as the product of the two. Phi(-|x|) is bell (1/2 - |x| N / D) with
// polynomials N and D of |x|: one formula for all x, exact at 0. It errs by less than 1e-7 in all, and at -1, -6 and
// -13 by 4e-7, 4e-6 and 1.3e-5 of itself.
template <class F>
struct Normal {
  F bell, phi, x_phi;
};
template <class F>
MLPKIT_HD Normal<F> normal(F x) {
  const F a = absolute(x);
  const F b = a > 13.f ? 13.f : a;
  const F inside = bell_up_to_13(b);
  const F bell = a > 13.f ? 0.f : inside;
  F over = b * 1.49756850e-2f + 1.08426771e-1f;
  over = over * b + 3.22360238e-1f;
  over = over * b + 3.98942019e-1f;
  F under = b * 2.99524989e-2f + 2.40706352e-1f;
  under = under * b + 8.37558583e-1f;
  under = under * b + 1.43468433f;
  under = under * b + 1.f;
  const F tail = bell * (0.5f - b * (over / under));
  // At Inf, where the tail is 0, as the product of x and Phi would have it: Inf, but NaN at -Inf.
  const F positive = x < 0.f ? 0.f : x, factor = x < 0.f ? a : b;
  return {bell, x < 0.f ? tail : 1.f - tail, positive - factor * tail};
}
MLPKIT_HD Normal<double> normal(double x) {
  const double u = x * 0.70710678118654752440;
  const double phi = u > -1.0 && u < 1.0 ? 0.5 + 0.5 * ::erf(u) : 0.5 * ::erfc(-u);
  return {::exp(-0.5 * x * x), phi, x * phi};
}

}  // namespace math
MLPKIT_END_ISA
