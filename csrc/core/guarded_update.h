// What a guarded update decides by: the settings of one step, which updates are proven to stay finite before they are
// made, and the loss scale (core; host and device).
#pragma once
#include "core/optimizer.h"

namespace mlpkit {

// The settings of a parameter group as torch.optim names them; rmsprop's alpha is beta2. trust: lars' coefficient.
struct GuardedGroup {
  double lr, beta1, beta2, eps, momentum, dampening, weight_decay, l1, trust;
  bool nesterov, maximize, amsgrad, centered;
};

// Upper bounds of the magnitudes in one tensor. NaN: nothing is known, or second holds a negative number.
struct Extents {
  double p, first, second, third;
};

struct GuardedScale {  // of the loss; its rule is that of torch.amp.GradScaler within bounds
  double growth, backoff, floor, ceiling;
  int64_t interval;  // clean steps before it grows; 0: it stays as it is
};

// Why a step was not taken.
enum class GuardedReason : int { taken, gradient, norm, scale, setting, update };

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// For step t of a tensor, t counted from 1. Lamb's norms come later.
MLPKIT_HD OptimizerSettingsOf<double> settings_at(Optimizer kind, const GuardedGroup& g, double t, double power1,
                                                  double power2) {
  OptimizerSettingsOf<double> s{};
  s.kind = kind;
  s.nesterov = g.nesterov;
  s.lr = g.lr;
  s.weight_decay = g.weight_decay;
  s.momentum = g.momentum;
  s.undamped = 1 - g.dampening;
  s.beta2 = g.beta2;
  s.rest1 = 1 - g.beta1;
  s.rest2 = 1 - g.beta2;
  s.eps = g.eps;
  s.correction1 = 1 - power1;
  s.root2 = ::sqrt(1 - power2);
  s.step_size = g.lr / s.correction1;
  s.shrink = 1 - g.lr * g.weight_decay;
  s.l1 = g.l1;
  s.amsgrad = g.amsgrad;
  s.centered = g.centered;
  s.fresh = t == 1;
  return s;
}

// The rate of a tensor by lars: lr trust |p| / (|g| + wd |p|), by 2-norms; lr where one of them is 0
// (You, Gitman, Ginsburg: "Large batch training of convolutional networks", 2017).
MLPKIT_HD double lars_rate(const GuardedGroup& g, double norm_of_p, double norm_of_g) {
  if (!(norm_of_p > 0 && norm_of_g > 0)) return g.lr;
  return g.lr * (g.trust * norm_of_p / (norm_of_g + ::fabs(g.weight_decay) * norm_of_p));
}

// Whether no element and no intermediate result of an update can exceed `limit`, from the largest magnitudes of what
// goes in; leaves in `e` what bounds the results. gradient: after unscaling and clipping. wide: the largest number that
// is computed with; limit: that is stored, 2^-7 below the largest so that no rounding matters.
MLPKIT_HD bool stays_within(const OptimizerSettingsOf<double>& s, Extents& e, double gradient, double limit,
                            double wide) {
  const bool adaptive = s.kind != Optimizer::sgd && s.kind != Optimizer::lars;
  if (adaptive && !(s.eps >= 0x1p-126)) return false;  // a divisor could be 0
  const bool decoupled = s.kind == Optimizer::adamw || s.kind == Optimizer::lamb;
  const double g = gradient + ::fabs(s.l1) + (decoupled ? 0 : ::fabs(s.weight_decay) * e.p);
  double p = s.kind == Optimizer::adamw ? e.p * ::fabs(s.shrink) : e.p;
  double step = g, inner = g;
  bool inside = g <= wide && ::fabs(s.lr) <= wide;
  if (adaptive) {
    e.second = ::fabs(s.beta2) * e.second + ::fabs(s.rest2) * g * g;
    inside = inside && s.beta2 >= 0 && s.rest2 >= 0 && ::fabs(s.rest2) * g <= wide && e.second <= limit;
  }
  switch (s.kind) {
    case Optimizer::sgd:
    case Optimizer::lars:
      if (s.momentum != 0) {
        e.first = s.fresh ? g : ::fabs(s.momentum) * e.first + ::fabs(s.undamped) * g;
        step = s.nesterov ? g + ::fabs(s.momentum) * e.first : e.first;
      }
      p += ::fabs(s.lr) * step;
      inside = inside && step <= wide;
      break;
    case Optimizer::rmsprop:
      if (s.centered) e.third += ::fabs(s.rest2) * (g + e.third);
      inner = ::sqrt(e.second) + s.eps;
      step = g / s.eps;
      if (s.momentum != 0) {
        e.first = ::fabs(s.momentum) * e.first + step;
        step = e.first;
        inside = inside && g / s.eps <= wide;
      }
      p += ::fabs(s.lr) * step;
      inside = inside && ::fabs(s.lr) * g <= wide;
      break;
    default:  // adam, adamw, lamb
      inner = g + e.first;
      e.first += ::fabs(s.rest1) * inner;
      if (s.amsgrad) e.third = e.third > e.second ? e.third : e.second;
      inside = inside && s.correction1 > 0 && s.root2 > 0 &&
               ::sqrt(s.amsgrad ? e.third : e.second) / s.root2 + s.eps <= wide;
      if (s.kind == Optimizer::lamb) {
        inside = inside && e.first / s.correction1 / s.eps + ::fabs(s.weight_decay) * p <= wide;
        p += ::fabs(s.rate);  // no element of a direction of length 1 is above 1
        break;
      }
      step = ::fabs(s.step_size) * e.first;
      inside = inside && step <= wide;
      p += step / s.eps;
  }
  e.p = p;
  // As positive statements: NaN fails.
  inside = inside && inner <= wide && p <= limit;
  const bool has_first = adaptive ? s.kind != Optimizer::rmsprop || s.momentum != 0 : s.momentum != 0;
  if (has_first) inside = inside && e.first <= limit;
  if (s.amsgrad || s.centered) inside = inside && e.third <= limit;
  return inside;
}

// The same of what torch.optim's operations compute on their way, in whatever order they multiply; after stays_within.
MLPKIT_HD bool stays_within_torch(const OptimizerSettingsOf<double>& s, const Extents& e, double gradient,
                                  double wide) {
  const bool decoupled = s.kind == Optimizer::adamw;
  const double g = gradient + (decoupled ? 0 : ::fabs(s.weight_decay) * e.p);
  if (s.kind == Optimizer::sgd) return true;
  const double divided = s.kind == Optimizer::rmsprop ? g : e.first;
  return !s.centered && g * g <= wide && divided / s.eps <= wide;
}

// What the gradients are multiplied by: 1 / scale, and clip / norm where the norm is above clip.
MLPKIT_HD double guarded_factor(double scale, double norm, double clip) {
  const double clipped = norm > clip ? clip / norm : 1;
  return clipped / scale;
}

// A factor as two, multiplied one after the other: below R's normal numbers a single one has few bits left, or none.
template <class R>
struct Factors {
  R first, second;
};
template <class R>
MLPKIT_HD Factors<R> factors_of(double factor) {
  const bool tiny = sizeof(R) == 4 && ::fabs(factor) < 0x1p-126;
  return {static_cast<R>(tiny ? 0x1p-126 : factor), static_cast<R>(tiny ? factor * 0x1p126 : 1)};
}

struct ScaleState {
  double scale;
  int64_t clean;
};
MLPKIT_HD ScaleState next_scale(const GuardedScale& rule, ScaleState now, bool overflowed) {
  if (rule.interval <= 0) return now;
  if (overflowed) {
    const double lower = now.scale * rule.backoff;
    return {lower < rule.floor ? rule.floor : lower, 0};
  }
  if (now.clean + 1 < rule.interval) return {now.scale, now.clean + 1};
  const double higher = now.scale * rule.growth;
  return {higher > rule.ceiling ? rule.ceiling : higher, 0};
}

MLPKIT_END_ISA
