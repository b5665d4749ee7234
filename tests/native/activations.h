// The activations and their slopes from the C library in long double, apart from core/activation.h (tests).
#pragma once
#include "core/activation.h"
#include "numbers.h"

namespace native {

using mlpkit::Activation;

// A value and the sum of the magnitudes that it is made of: what its rounding errors are measured by.
struct Measured {
  Real value, magnitude;
};

inline Real bell(Real z) { return std::exp(-z * z / 2) * 0.398942280401432677939946L; }
inline Real normal_cdf(Real z) { return std::erfc(-z * 0.707106781186547524400845L) / 2; }
inline Real sigmoid(Real z) { return 1 / (1 + std::exp(-z)); }
inline Real inner(Real z) { return 0.797884560802865355879892L * (z + 0.044715L * z * z * z); }
inline Real inner_slope(Real z) { return 0.797884560802865355879892L * (1 + 3 * 0.044715L * z * z); }

// An error of z is an error of the value, by at most 1.13 times as much: |z| takes part.
inline Measured value(Activation activation, Real z, Real a) {
  const Real size = std::fabs(z);
  switch (activation) {
    case Activation::identity:
      return {z, size};
    case Activation::relu:
      return {z > 0 ? z : 0, size};
    case Activation::leaky_relu:
    case Activation::prelu:
      return {z > 0 ? z : a * z, size * std::max<Real>(1, std::fabs(a))};
    case Activation::gelu:
      return {z * normal_cdf(z), size};
    case Activation::gelu_tanh:
      return {z * (1 + std::tanh(inner(z))) / 2, size};
    case Activation::silu:
      return {z * sigmoid(z), size};
    case Activation::sigmoid:
      return {sigmoid(z), size + 1};
    case Activation::tanh:
      return {std::tanh(z), size};
  }
  return {NAN, 0};
}

inline Measured slope(Activation activation, Real z, Real a) {
  const Real size = std::fabs(z), s = sigmoid(z), t = std::tanh(inner(z));
  switch (activation) {
    case Activation::leaky_relu:
    case Activation::prelu:
      return {z > 0 ? 1 : a, 1 + std::fabs(a)};
    case Activation::gelu:
      return {normal_cdf(z) + z * bell(z), 1 + size};
    case Activation::gelu_tanh:
      return {(1 + t) / 2 + z * (1 - t * t) * inner_slope(z) / 2, 1 + size * inner_slope(z)};
    case Activation::silu:
      return {s * (1 + z * (1 - s)), 1 + size};
    case Activation::sigmoid:
      return {s * (1 - s), 1};
    case Activation::tanh:
      return {1 - std::tanh(z) * std::tanh(z), 1};
    default:
      return {1, 1};
  }
}

}  // namespace native
