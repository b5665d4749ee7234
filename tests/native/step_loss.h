// The losses and their slopes in long double, apart from core/loss.h, with bounds of what fp32 makes of them (tests).
#pragma once
#include "core/loss.h"
#include "step_format.h"

namespace native {

using mlpkit::Loss;

constexpr int kRoundings = 8;  // at most so many in a chain take part in one element

struct LossAt {
  Bounded value, slope;
};

// A loss of one output z by its target t. An error of z is one of the value by the slope, of the slope by the
// curvature.
inline LossAt loss_at(Loss kind, Bounded z, Real t, Real delta) {
  const Real d = z.value - t, size = std::fabs(d), e = z.error, step = kRoundings * kUnit;
  const Real sign = d > 0 ? 1 : d < 0 ? -1 : 0;
  switch (kind) {
    case Loss::mse:
      return {{d * d, 2 * size * e + e * e + step * d * d}, {2 * d, 2 * e + step * size}};
    case Loss::l1:  // within the error of 0 either sign is right
      return {{size, e + step * size}, {sign, size <= e ? 2.0L : 0.0L}};
    case Loss::huber: {
      const bool near = size < delta;
      const Real value = near ? d * d / 2 : delta * (size - delta / 2), slope = near ? d : sign * delta;
      return {{value, delta * (e + step * (size + delta))}, {slope, e + step * std::fabs(slope)}};
    }
    case Loss::bce: {
      const Real sigmoid = 1 / (1 + std::exp(-z.value)), rest = std::log1p(std::exp(-std::fabs(z.value)));
      const Real value = std::max<Real>(z.value, 0) - z.value * t + rest;
      const Real magnitude = std::fabs(z.value) * (1 + std::fabs(t)) + 1;
      return {{value, e + step * magnitude}, {sigmoid - t, e / 4 + step * (sigmoid + std::fabs(t))}};
    }
    default: {  // log_mse
      const Real log_z = std::log(z.value), log_t = std::log(t), by_log = log_z - log_t;
      const Real error = e / z.value + step * (std::fabs(log_z) + std::fabs(log_t)), slope = 2 * by_log / z.value;
      return {{by_log * by_log, 2 * std::fabs(by_log) * error + error * error + step * by_log * by_log},
              {slope, 2 * error / z.value + std::fabs(slope) * (e / z.value + step)}};
    }
  }
}

struct EntropyOfRow {
  mlpkit::Smoothing smoothing;
  int64_t wanted;              // -1: ignored
  Real weight;                 // of the row
  std::vector<Real> by_class;  // the weight of every class
  std::vector<Bounded> outputs;

  int64_t classes() const { return static_cast<int64_t>(outputs.size()); }
  const Bounded& output(int64_t c) const { return outputs[static_cast<size_t>(c)]; }
  Real of_class(int64_t c) const { return by_class[static_cast<size_t>(c)]; }

  // S = log sum exp z. An error of the exponent is a relative one of its exponential, which sums do not enlarge.
  Bounded surprise() const {
    Real sum = 0, largest = 0, error = 0;
    for (const Bounded& z : outputs) {
      sum += std::exp(z.value);
      largest = std::max(largest, std::fabs(z.value));
      error = std::max(error, z.error);
    }
    const Real value = std::log(sum);
    const Real roundings = static_cast<Real>(classes() + kRoundings) + 2 * largest + 2 * std::fabs(value);
    return {value, error + roundings * kUnit};
  }

  Bounded value() const {
    if (wanted < 0) return {0, 0};
    const Bounded s = surprise(), at = output(wanted);
    Real spread = 0, spread_error = 0, total = 0;
    const Real roundings = static_cast<Real>(classes() + kRoundings) * kUnit;
    for (int64_t c = 0; c < classes(); ++c) {
      const Real z = output(c).value, v = of_class(c);
      spread += v * (s.value - z);
      spread_error += v * (s.error + output(c).error + roundings * (std::fabs(s.value) + std::fabs(z)));
      total += v;
    }
    const Real certain = weight * smoothing.certain, magnitude = std::fabs(s.value) + std::fabs(at.value);
    return {certain * (s.value - at.value) + smoothing.spread * spread,
            certain * (s.error + at.error + kRoundings * kUnit * magnitude) + smoothing.spread * spread_error};
  }

  Bounded slope(int64_t c) const {
    if (wanted < 0) return {0, 0};
    const Bounded s = surprise();
    const Real share = std::exp(output(c).value - s.value), share_error = share * (2 * s.error + kRoundings * kUnit);
    const Real certain = weight * smoothing.certain, is_class = c == wanted, v = of_class(c);
    Real total = 0;
    for (const Real of : by_class) total += of;
    const Real magnitude = certain * (share + is_class) + smoothing.spread * (total * share + v);
    return {certain * (share - is_class) + smoothing.spread * (total * share - v),
            (certain + smoothing.spread * total) * share_error + kRoundings * kUnit * magnitude};
  }

  // The same of the squared error of p = softmax(z), d = p - [class].
  Bounded share(int64_t c) const {
    const Bounded s = surprise();
    const Real p = std::exp(output(c).value - s.value);
    return {p, p * (2 * s.error + kRoundings * kUnit)};
  }
  Bounded deviation(int64_t c) const {
    const Bounded p = share(c);
    const Real d = p.value - (c == wanted);
    return {d, p.error + kUnit * std::fabs(d)};
  }
  Bounded brier() const {
    if (wanted < 0) return {0, 0};
    Bounded sum{0, 0};
    for (int64_t c = 0; c < classes(); ++c) {
      const Bounded d = deviation(c);
      sum.value += d.value * d.value;
      sum.error += d.error * (2 * std::fabs(d.value) + d.error);
    }
    sum.error += static_cast<Real>(classes() + kRoundings) * kUnit * sum.value;
    return sum;
  }
  Bounded brier_slope(int64_t c) const {
    if (wanted < 0) return {0, 0};
    Bounded expected{0, 0};
    Real magnitude = 0;
    for (int64_t i = 0; i < classes(); ++i) {
      const Bounded p = share(i), d = deviation(i);
      expected.value += p.value * d.value;
      expected.error += p.error * std::fabs(d.value) + (p.value + p.error) * d.error;
      magnitude += p.value * std::fabs(d.value);
    }
    const Bounded p = share(c), d = deviation(c);
    const Real rest = d.value - expected.value, roundings = static_cast<Real>(classes() + kRoundings) * kUnit;
    const Real error = d.error + expected.error + roundings * (magnitude + std::fabs(d.value));
    return {2 * p.value * rest, 2 * (p.error * (std::fabs(rest) + error) + p.value * error) +
                                    kRoundings * kUnit * std::fabs(2 * p.value * rest)};
  }
};

}  // namespace native
