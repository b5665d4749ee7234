// How the learning rate moves over a training, as a factor of the rate that was asked for (core; host).
#pragma once
#include <cmath>
#include <cstdint>

namespace mlpkit {

enum class Schedule : int { constant, cosine, step, exponential, one_cycle, coslog4 };

struct ScheduleSettings {
  Schedule kind = Schedule::constant;
  double warmup = 0.0;  // epochs in which the rate rises in equal steps to what it would be
  double floor = 0.0;   // cosine ends at this factor
  double gamma = 1.0;   // step: factor every `every` epochs; exponential: every epoch
  int64_t every = 1;
};

// One-cycle: 0.3 of the steps up, from 1/25, the rest down to 1/25 of 10^-4 (Smith, Topin: "Super-convergence", 2018).
constexpr double kCycleUp = 0.3, kCycleStart = 1.0 / 25.0, kCycleEnd = kCycleStart * 1e-4;
constexpr double kPi = 3.14159265358979323846;

// From `start` to `end` as `share` goes from 0 to 1, along half a cosine.
inline double along_cosine(double start, double end, double share) {
  return end + (start - end) * (1.0 + std::cos(kPi * share)) / 2.0;
}

// The factor for step `step` (from 0) of `steps` in all, `per_epoch` of them an epoch.
inline double schedule_factor(const ScheduleSettings& s, int64_t step, int64_t per_epoch, int64_t steps) {
  const double at = static_cast<double>(step), all = static_cast<double>(steps);
  const double rise = std::ceil(s.warmup * static_cast<double>(per_epoch));
  const double warm = at < rise ? (at + 1.0) / rise : 1.0;
  const double after = at < rise ? 0.0 : at - rise, left = all - rise;
  switch (s.kind) {
    case Schedule::constant:
      return warm;
    case Schedule::cosine:
      return warm * along_cosine(1.0, s.floor, left > 0.0 ? std::fmin(after / left, 1.0) : 1.0);
    case Schedule::step:
      return warm * std::pow(s.gamma, static_cast<double>(step / per_epoch / s.every));
    case Schedule::exponential:
      return warm * std::pow(s.gamma, static_cast<double>(step / per_epoch));
    case Schedule::coslog4:  // Holzmueller et al.: "Better by default", 2024
      return warm * (0.5 - 0.5 * std::cos(2.0 * kPi * std::log2(1.0 + 15.0 * at / all)));
    case Schedule::one_cycle:
      break;
  }
  const double top = kCycleUp * all - 1.0, last = all - 1.0;
  if (top > 0.0 && at <= top) return along_cosine(kCycleStart, 1.0, at / top);
  return along_cosine(1.0, kCycleEnd, last > top ? std::fmin((at - std::fmax(top, 0.0)) / (last - top), 1.0) : 1.0);
}

}  // namespace mlpkit
