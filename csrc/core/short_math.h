// A float whose results are rounded to 16 bits: the activations' formulas with elementary functions made of the two
// approximations that a GPU has as instructions, 2^x and 1/x, in a third of the steps (core; host and device).
// Absolute errors stay below 3e-7, a hundredth of half an ulp of float16 at 1; NaN stays NaN, and Inf goes where it
// does for float.
#pragma once
#include "core/macros.h"
#include "core/math.h"

MLPKIT_BEGIN_ISA

struct Short {
  float v;
  Short() = default;
  MLPKIT_HD Short(float v) : v(v) {}

  MLPKIT_HD friend Short operator+(Short a, Short b) { return a.v + b.v; }
  MLPKIT_HD friend Short operator-(Short a, Short b) { return a.v - b.v; }
  MLPKIT_HD friend Short operator*(Short a, Short b) { return a.v * b.v; }
  MLPKIT_HD friend bool operator<(Short a, Short b) { return a.v < b.v; }
  MLPKIT_HD friend bool operator>(Short a, Short b) { return a.v > b.v; }
  MLPKIT_HD friend bool operator<=(Short a, Short b) { return a.v <= b.v; }
};

namespace math {

MLPKIT_HD float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return ::exp2f(x);
#endif
}
MLPKIT_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  asm("rcp.approx.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1.f / x;
#endif
}

// sigmoid(x) = 1 / (1 + 2^(-x / ln 2))
template <>
MLPKIT_HD Short sigmoid(Short x) {
  return reciprocal(1.f + power_of_two(x.v * -1.44269504f));
}

// tanh(x) = x - x^3 / 3 + 2 x^5 / 15 - 17 x^7 / 315 near 0,  1 - 2 / (1 + 2^(2 x / ln 2)) elsewhere
template <>
MLPKIT_HD Short tanh(Short x) {
  const float t = x.v * x.v;
  const float small = x.v + x.v * t * ((-0.0539682540f * t + 0.133333333f) * t - 0.333333333f);
  const float large = 1.f - 2.f * reciprocal(1.f + power_of_two(x.v * 2.88539008f));
  return t < 0.0625f ? small : large;
}

// Phi(-a) = bell(a) (c1 t + c2 t^2 + ... + c5 t^5),  t = 1 / (1 + 0.2316419 a) for a >= 0 (Abramowitz and
// Stegun, 26.2.17)
template <>
MLPKIT_HD Normal<Short> normal(Short x) {
  const float a = absolute(x.v);
  const float bell = a > 13.f ? 0.f : power_of_two(a * a * -0.721347520f);
  const float t = reciprocal(1.f + 0.2316419f * a);
  float q = 0.530702714f * t - 0.726576013f;
  q = q * t + 0.710706870f;
  q = q * t - 0.142248368f;
  q = q * t + 0.127414796f;
  const float tail = bell * (q * t);
  const float phi = x.v < 0.f ? tail : 1.f - tail;
  return {bell, phi, x.v * phi};
}

}  // namespace math
MLPKIT_END_ISA
