// Parameter updates, each formula once (core; host and device). F is a number or a SIMD vector of numbers, S the
// settings in its precision. p: parameter, g: gradient after unscaling and clipping, first, second and third: the
// optimizer's state for that element. Products are rounded where torch.optim's fused CPU kernels round them and
// contracted where those contract them, so that the files which include this are compiled without contraction of the
// compiler's own choice.
#pragma once
#include "core/macros.h"
#include "core/multiply_add.h"

namespace mlpkit {

enum class Optimizer : int { sgd, adam, adamw, rmsprop, lars, lamb };

// Differences and quotients of settings are formed in double before they are rounded: 1 - beta in float would be off by
// 2e-7.
template <class R>
struct OptimizerSettingsOf {
  Optimizer kind;
  bool nesterov;
  R lr, weight_decay, momentum, undamped;  // undamped: 1 - dampening; lars: lr is that of the tensor
  R beta2, rest1, rest2, eps;              // rest: 1 - beta; rmsprop's alpha is beta2
  R step_size, root2, shrink;              // adam: lr / (1 - beta1^t), sqrt(1 - beta2^t), adamw's 1 - lr wd
  R l1 = 0;
  bool amsgrad = false, centered = false;
  bool fresh = false;    // sgd, lars: the momentum buffer is empty
  R correction1 = 1;     // lamb: 1 - beta1^t
  R rate = 0, unit = 0;  // lamb: lr |p| (2-norms of the tensor), 1 / |direction|
  R inverse_root2 = 0;   // 1 / root2 as rounded() leaves it; 0: divide by root2
};
using OptimizerSettings = OptimizerSettingsOf<float>;

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

template <class To, class From>
MLPKIT_HD OptimizerSettingsOf<To> rounded(const OptimizerSettingsOf<From>& s) {
  const auto to = [](From x) { return static_cast<To>(x); };
  const To root2 = to(s.root2);
  const To inverse = root2 >= To(0x1p-40) && root2 <= To(0x1p40) ? 1 / root2 : 0;
  return {s.kind,      s.nesterov,  to(s.lr),  to(s.weight_decay), to(s.momentum), to(s.undamped), to(s.beta2),
          to(s.rest1), to(s.rest2), to(s.eps), to(s.step_size),    root2,          to(s.shrink),   to(s.l1),
          s.amsgrad,   s.centered,  s.fresh,   to(s.correction1),  to(s.rate),     to(s.unit),     inverse};
}

// g + wd p, the gradient of wd p^2 / 2 added
template <class S, class F>
MLPKIT_HD F with_l2(const S& s, F p, F g) {
  return s.weight_decay != 0 ? math::multiply_add(math::splat<F>(s.weight_decay), p, g) : g;
}
// g + l1 sign(p), a subgradient of l1 |p| added
template <class S, class F>
MLPKIT_HD F with_l1(const S& s, F p, F g) {
  if (s.l1 == 0) return g;
  return g + (p > 0 ? math::splat<F>(s.l1) : (p < 0 ? math::splat<F>(-s.l1) : F{}));
}

// g' = g + wd p + l1 sign(p) here and below;  b = mu b + (1 - d) g' (the first time b = g');  p -= lr (nesterov: g' +
// mu b, otherwise b)
struct Sgd {
  template <class S, class F>
  MLPKIT_HD static void update(const S& s, F& p, F g, F& first, F&, F&) {
    g = with_l1(s, p, with_l2(s, p, g));
    if (s.momentum != 0) {
      first = s.fresh ? g : math::multiply_add(math::splat<F>(s.undamped), g, s.momentum * first);
      g = s.nesterov ? math::multiply_add(math::splat<F>(s.momentum), first, g) : first;
    }
    p = math::multiply_add(math::splat<F>(-s.lr), g, p);
  }
};

// m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
template <class S, class F>
MLPKIT_HD void move_moments(const S& s, F g, F& first, F& second) {
  first = math::multiply_add(math::splat<F>(s.rest1), g - first, first);
  second = math::multiply_add(s.rest2 * g, g, s.beta2 * second);
}

// m, v as above of g';  p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// (Kingma, Ba: "Adam", ICLR 2015). adam adds wd p to g; adamw shrinks p by 1 - lr wd first (Loshchilov, Hutter, ICLR
// 2019). amsgrad divides by the largest v so far (Reddi, Kale, Kumar, ICLR 2018).
struct Adam {
  template <class S, class F>
  MLPKIT_HD static void update(const S& s, F& p, F g, F& first, F& second, F& third) {
    if (s.kind == Optimizer::adam) g = with_l2(s, p, g);
    g = with_l1(s, p, g);
    if (s.kind == Optimizer::adamw) p = p * s.shrink;
    move_moments(s, g, first, second);
    if (s.amsgrad) third = second > third ? second : third;
    const F divisor = math::divided(math::sqrt(s.amsgrad ? third : second), s.root2, s.inverse_root2) + s.eps;
    p = p + (-s.step_size * first) / divisor;
  }
};

// v = a v + (1 - a) g'^2;  p -= lr g' / (sqrt(v) + eps)
// centered: h += (1 - a) (g' - h) and v - h^2 in place of v (Graves, 2013), where rounding below 0 counts as 0.
// momentum: b = mu b + g' / (sqrt(v) + eps);  p -= lr b
struct Rmsprop {
  template <class S, class F>
  MLPKIT_HD static void update(const S& s, F& p, F g, F& first, F& second, F& third) {
    g = with_l1(s, p, with_l2(s, p, g));
    second = math::multiply_add(s.rest2 * g, g, s.beta2 * second);
    F variance = second;
    if (s.centered) {
      third = math::multiply_add(math::splat<F>(s.rest2), g - third, third);
      variance = math::multiply_add(-third, third, second);
      variance = variance < 0 ? F{} : variance;
    }
    const F divisor = math::sqrt(variance) + s.eps;
    if (s.momentum != 0) {
      first = s.momentum * first + g / divisor;
      p = math::multiply_add(math::splat<F>(-s.lr), first, p);
    } else {
      p = p + (-s.lr * g) / divisor;
    }
  }
};

// m, v as Adam's;  r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p;  p -= lr |p| / |r| r, the norms taken over
// the tensor, their quotient 1 where one of them is 0 (You et al.: "Large batch optimization for deep learning", ICLR
// 2020). r / |r| is formed first: no quotient of norms can overflow.
struct Lamb {
  template <class S, class F>
  MLPKIT_HD static void move(const S& s, F p, F g, F& first, F& second) {
    move_moments(s, with_l1(s, p, g), first, second);
  }
  template <class S, class F>
  MLPKIT_HD static F direction(const S& s, F p, F first, F second) {
    const F r = (first / s.correction1) / (math::sqrt(second) / s.root2 + s.eps);
    return math::multiply_add(math::splat<F>(s.weight_decay), p, r);
  }
  template <class S, class F>
  MLPKIT_HD static void update(const S& s, F& p, F first, F second) {
    p = p - s.rate * (direction(s, p, first, second) * s.unit);
  }
};

MLPKIT_END_ISA
