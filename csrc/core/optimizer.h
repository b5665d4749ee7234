// Parameter updates, each formula once, as torch.optim computes them (core; host and device). F is float or a SIMD
// vector of floats. p: parameter, g: gradient after unscaling and clipping, first and second: the optimizer's state for
// that element.
#pragma once
#include "core/macros.h"
#include "core/math.h"

namespace mlpkit {

enum class Optimizer : int { sgd, adam, adamw, rmsprop };

// Differences and quotients of settings are formed in double before they are rounded: 1 - beta in float would be off by
// 2e-7.
struct OptimizerSettings {
  Optimizer kind;
  bool nesterov;
  float lr, weight_decay, momentum, undamped;  // undamped: 1 - dampening
  float beta2, rest1, rest2, eps;              // rest: 1 - beta; rmsprop's alpha is beta2
  float step_size, correction2, shrink;        // adam: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), adamw's 1 - lr wd
};

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// g' = g + wd p;  b = mu b + (1 - d) g';  p -= lr (nesterov: g' + mu b, otherwise b)
struct Sgd {
  template <class F>
  MLPKIT_HD static void update(const OptimizerSettings& s, F& p, F g, F& first, F&) {
    g = g + s.weight_decay * p;
    if (s.momentum == 0.f) {
      p = p - s.lr * g;
      return;
    }
    first = s.momentum * first + s.undamped * g;
    p = p - s.lr * (s.nesterov ? g + s.momentum * first : first);
  }
};

// m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// (Kingma, Ba: "Adam", ICLR 2015). adam adds wd p to g; adamw shrinks p by 1 - lr wd first (Loshchilov, Hutter, ICLR
// 2019).
struct Adam {
  template <class F>
  MLPKIT_HD static void update(const OptimizerSettings& s, F& p, F g, F& first, F& second) {
    if (s.kind == Optimizer::adamw)
      p = p * s.shrink;
    else
      g = g + s.weight_decay * p;
    first = first + s.rest1 * (g - first);
    second = s.beta2 * second + s.rest2 * (g * g);
    p = p - s.step_size * (first / (math::sqrt(second) * s.correction2 + s.eps));
  }
};

// v = a v + (1 - a) g'^2;  p -= lr g' / (sqrt(v) + eps),  g' = g + wd p
struct Rmsprop {
  template <class F>
  MLPKIT_HD static void update(const OptimizerSettings& s, F& p, F g, F&, F& second) {
    g = g + s.weight_decay * p;
    second = s.beta2 * second + s.rest2 * (g * g);
    p = p - s.lr * (g / (math::sqrt(second) + s.eps));
  }
};

MLPKIT_END_ISA
