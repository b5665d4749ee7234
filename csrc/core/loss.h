// Losses and their slopes by the output, each formula once (core; host and device). z: an output, t: its target.
#pragma once
#include "core/macros.h"
#include "core/math.h"

namespace mlpkit {

enum class Loss : int { cross_entropy, bce, mse, l1, huber };

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

struct LossTerm {
  float value, slope;
};

// (z - t)^2
MLPKIT_HD LossTerm mse(float z, float t) { return {(z - t) * (z - t), 2.f * (z - t)}; }

// |z - t|; the slope at 0 is 0
MLPKIT_HD LossTerm l1(float z, float t) {
  const float d = z - t;
  return {math::absolute(d), d > 0.f ? 1.f : (d < 0.f ? -1.f : d * 0.f)};
}

// d^2 / 2 where |d| < 1, |d| - 1/2 elsewhere,  d = z - t
MLPKIT_HD LossTerm huber(float z, float t) {
  const float d = z - t, size = math::absolute(d);
  if (size < 1.f) return {0.5f * d * d, d};
  return {size - 0.5f, d > 0.f ? 1.f : (d < 0.f ? -1.f : d)};
}

// max(z, 0) - z t + log(1 + exp(-|z|)),  slope sigmoid(z) - t
MLPKIT_HD LossTerm bce(float z, float t) {
  const float positive = z > 0.f ? z : (z <= 0.f ? 0.f : z);
  return {positive - z * t + ::log1pf(math::exp(-math::absolute(z))), math::sigmoid(z) - t};
}

// -log softmax(z)[t] over one row; slope softmax(z) - [j = t], written to slopes times scale
MLPKIT_HD float cross_entropy(const float* z, int64_t classes, int64_t t, float scale, float* slopes) {
  float top = z[0];
  for (int64_t j = 1; j < classes; ++j) top = z[j] > top ? z[j] : top;
  float sum = 0.f;
  for (int64_t j = 0; j < classes; ++j) {
    slopes[j] = math::exp(z[j] - top);
    sum += slopes[j];
  }
  for (int64_t j = 0; j < classes; ++j) slopes[j] = scale * (slopes[j] / sum - (j == t ? 1.f : 0.f));
  return ::logf(sum) + top - z[t];
}

MLPKIT_END_ISA
