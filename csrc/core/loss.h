// Losses and their slopes by the output, each formula once (core; host and device). F is float or a SIMD vector of
// floats. z: an output, t: its target.
#pragma once
#include "core/macros.h"
#include "core/math.h"

namespace mlpkit {

enum class Loss : int { cross_entropy, bce, mse, l1, huber, log_mse, brier };

// Whether the target is a class, not numbers.
constexpr bool of_classes(Loss loss) { return loss == Loss::cross_entropy || loss == Loss::brier; }

struct Smoothing {  // of cross_entropy, with e the label smoothing: 1 - e, e / classes, the sum of class weights
  float certain, spread, total;
};

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

template <class F>
struct LossTerm {
  F value, slope;
};

// (z - t)^2
struct Mse {
  template <class F>
  MLPKIT_HD static LossTerm<F> at(F z, F t, float) {
    return {(z - t) * (z - t), 2.f * (z - t)};
  }
};

// |z - t|; the slope at 0 is 0
struct L1 {
  template <class F>
  MLPKIT_HD static LossTerm<F> at(F z, F t, float) {
    const F d = z - t;
    return {math::absolute(d), d > 0.f ? F{} + 1.f : (d < 0.f ? F{} - 1.f : d * 0.f)};
  }
};

// d^2 / 2 where |d| < delta, delta (|d| - delta / 2) elsewhere,  d = z - t
struct Huber {
  template <class F>
  MLPKIT_HD static LossTerm<F> at(F z, F t, float delta) {
    const F d = z - t, size = math::absolute(d);
    return {size < delta ? 0.5f * d * d : delta * (size - 0.5f * delta),
            size < delta ? d : (d > 0.f ? F{} + delta : (d < 0.f ? F{} - delta : d))};
  }
};

// max(z, 0) - z t + log(1 + exp(-|z|)),  slope sigmoid(z) - t
struct Bce {
  template <class F>
  MLPKIT_HD static LossTerm<F> at(F z, F t, float) {
    const F positive = z > 0.f ? z : (z <= 0.f ? F{} : z);
    return {positive - z * t + math::log1p_up_to_1(math::exp(-math::absolute(z))), math::sigmoid(z) - t};
  }
};

// (log z - log t)^2
struct LogMse {
  template <class F>
  MLPKIT_HD static LossTerm<F> at(F z, F t, float) {
    const F d = math::log(z) - math::log(t);
    return {d * d, 2.f * d / z};
  }
};

// Calls body(Term{}) with the formula struct of a loss by single outputs, and does nothing for those of classes, whose
// outputs go together: the one run-time to compile-time switch.
template <class Body>
MLPKIT_HD void visit_loss(Loss loss, Body&& body) {
  switch (loss) {
    case Loss::cross_entropy:
    case Loss::brier:
      return;
    case Loss::bce:
      return body(Bce{});
    case Loss::mse:
      return body(Mse{});
    case Loss::l1:
      return body(L1{});
    case Loss::huber:
      return body(Huber{});
    case Loss::log_mse:
      return body(LogMse{});
  }
}

// With w the weight of a row's class t, e the label smoothing, C classes of weights v and W their sum:
//   w (1 - e) (S - z_t) + e / C sum_j v_j (S - z_j),  S = log sum_j exp z_j
// slope by z_j: w (1 - e) (softmax_j - [j = t]) + e / C (W softmax_j - v_j).
template <class F>
MLPKIT_HD F cross_entropy_slope(const Smoothing& s, F softmax, F is_class, F weight, F v) {
  return weight * s.certain * (softmax - is_class) + s.spread * (s.total * softmax - v);
}

// Brier's score, sum_j (p_j - [j = t])^2 with p = softmax(z) (Brier: "Verification of forecasts expressed in terms of
// probability", 1950).
// slope by z_j: 2 p_j (d_j - sum_i p_i d_i),  d_j = p_j - [j = t]
template <class F>
MLPKIT_HD F brier_slope(F softmax, F is_class, F expected) {
  return 2.f * softmax * (softmax - is_class - expected);
}

MLPKIT_END_ISA
