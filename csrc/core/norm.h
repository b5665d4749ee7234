// Normalisation and its gradient, each formula once (core; host and device). F is float, double or a SIMD vector of
// floats. mean and variance are taken over the rows of a column (batch) or the columns of a row (layer).
#pragma once
#include <math.h>

#include "core/macros.h"

namespace mlpkit {

enum class Norm : int { none, batch, layer };

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// Mean and sum of squared deviations of a part of the numbers, and those of all: Chan, Golub, LeVeque (1983).
struct Moments {
  double mean, squares;
};

// Of n numbers z, from the sums over d = z - pivot: what rounding did to the pivot is put right again. Where a number
// is Inf, d is NaN, and so is the sum of squares, but the mean is that Inf.
MLPKIT_HD Moments moments_around(double pivot, double sum, double sum_of_squares, double n) {
  return {sum - sum == 0 ? pivot + sum / n : pivot, sum_of_squares - sum * sum / n};
}

// What a part of n numbers adds to the sum of squares around the mean of all.
MLPKIT_HD double squares_around(double mean, Moments part, double n) {
  return part.squares + n * ((part.mean - mean) * (part.mean - mean));
}

// r = 1 / sqrt(variance + eps)
template <class F>
MLPKIT_HD F inverse_deviation(F variance, double eps) {
  return static_cast<F>(1.0 / ::sqrt(static_cast<double>(variance) + eps));
}

// x = (z - mean) r,  u = x w + b
template <class F>
MLPKIT_HD F normalised(F z, F mean, F r) {
  return (z - mean) * r;
}
template <class F>
MLPKIT_HD F scaled_and_shifted(F x, F w, F b) {
  return x * w + b;
}

// dz = r (g - mean(g) - x mean(g x)),  g = du w; both means are 0 where the statistics were given
template <class F>
MLPKIT_HD F norm_gradient(F g, F x, F r, F mean_g, F mean_gx) {
  return r * ((g - mean_g) - x * mean_gx);
}

MLPKIT_END_ISA
