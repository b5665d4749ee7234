// The loss of a panel of outputs and its slopes by them, rows in lanes (cpu). Included by the mlp_step kernels only.
#pragma once
#include "cpu/mlp_step.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

// z and slopes: [classes, 32]. Exponentials wait in `slopes` for their sum.
MLPKIT_HD double cross_entropy_of_lanes(const StepLoss& loss, int64_t panel, int64_t classes, const float* z,
                                        float* slopes) {
  FloatVec top = load_bits<FloatVec>(z), sum{}, of_class{}, by_weight{};
  const IntVec wanted = load_bits<IntVec>(loss.classes + panel);
  const FloatVec weight = load_bits<FloatVec>(loss.weights + panel);
  for (int64_t c = 1; c < classes; ++c) {
    const FloatVec at = load_bits<FloatVec>(z + c * kPanel);
    top = at > top ? at : top;
  }
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVec at = load_bits<FloatVec>(z + c * kPanel), e = math::exp(at - top);
    store(slopes + c * kPanel, e);
    sum += e;
    of_class = wanted == static_cast<int32_t>(c) ? at : of_class;
    if (loss.by_class)
      by_weight += loss.by_class[c] * at;
    else
      by_weight += at;
  }
  const FloatVec share_of_row = loss.by_row ? load_bits<FloatVec>(loss.by_row + panel) : FloatVec{} + 1.f;
  const FloatVec inverse = 1.f / sum;
  // A row that does not count gives no slope, but its NaN is not hidden: the sum is finite otherwise.
  const FloatVec ignored = wanted == kIgnored ? 0.f * sum : FloatVec{};
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVec share = load_bits<FloatVec>(slopes + c * kPanel) * inverse;
    const FloatVec is_class = wanted == static_cast<int32_t>(c) ? FloatVec{} + 1.f : FloatVec{};
    const FloatVec v = FloatVec{} + (loss.by_class ? loss.by_class[c] : 1.f);
    const FloatVec slope = loss.scale * cross_entropy_slope(loss.smoothing, share, is_class, weight, v);
    store(slopes + c * kPanel, wanted >= 0 ? slope * share_of_row : ignored);
  }
  const FloatVec surprise = math::log(sum) + top;
  const FloatVec spread = loss.smoothing.spread * (loss.smoothing.total * surprise - by_weight);
  const FloatVec value = weight * loss.smoothing.certain * (surprise - of_class) + spread;
  return sum_of_lanes(wanted >= 0 ? value * share_of_row : FloatVec{});
}

// z and slopes: [classes, 32]. Exponentials wait in `slopes` for their sum.
MLPKIT_HD double brier_of_lanes(const StepLoss& loss, int64_t panel, int64_t classes, const float* z, float* slopes) {
  FloatVec top = load_bits<FloatVec>(z), sum{}, expected{}, value{};
  const IntVec wanted = load_bits<IntVec>(loss.classes + panel);
  for (int64_t c = 1; c < classes; ++c) {
    const FloatVec at = load_bits<FloatVec>(z + c * kPanel);
    top = at > top ? at : top;
  }
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVec e = math::exp(load_bits<FloatVec>(z + c * kPanel) - top);
    store(slopes + c * kPanel, e);
    sum += e;
  }
  const FloatVec inverse = 1.f / sum;
  const auto is_class = [&](int64_t c) { return wanted == static_cast<int32_t>(c) ? FloatVec{} + 1.f : FloatVec{}; };
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVec share = load_bits<FloatVec>(slopes + c * kPanel) * inverse, d = share - is_class(c);
    store(slopes + c * kPanel, share);
    expected += share * d;
    value += d * d;
  }
  const FloatVec share_of_row = loss.by_row ? load_bits<FloatVec>(loss.by_row + panel) : FloatVec{} + 1.f;
  for (int64_t c = 0; c < classes; ++c) {
    const FloatVec share = load_bits<FloatVec>(slopes + c * kPanel);
    const FloatVec slope = loss.scale * brier_slope(share, is_class(c), expected) * share_of_row;
    store(slopes + c * kPanel, wanted >= 0 ? slope : FloatVec{});
  }
  return sum_of_lanes(wanted >= 0 ? value * share_of_row : FloatVec{});
}

// z, target and slopes: [outputs, 32]; by_row: what each lane is multiplied by; count: how many of the lanes are rows.
template <class Term>
MLPKIT_HD double loss_of_lanes(const StepLoss& loss, FloatVec by_row, int64_t count, int64_t outputs, const float* z,
                               const float* target, float* slopes) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  double sum = 0.0;
  for (int64_t c = 0; c < outputs; ++c) {
    const LossTerm<FloatVec> term =
        Term::at(load_bits<FloatVec>(z + c * kPanel), load_bits<FloatVec>(target + c * kPanel), loss.delta);
    const IntVec inside = lane < static_cast<int32_t>(count < kLanes ? count : kLanes);
    store(slopes + c * kPanel, inside ? term.slope * loss.scale * by_row : FloatVec{});
    sum += sum_of_lanes(inside ? term.value * by_row : FloatVec{});
  }
  return sum;
}

// The panel's share of the loss; slopes become those by its outputs z. target: a panel, of losses that have one.
inline double loss_of_panel(const StepPanel& step, int64_t outputs, const float* z, const float* target,
                            float* slopes) {
  const StepLoss& loss = step.loss;
  double sum = 0.0;
  for (int64_t row = 0; row < kPanel; row += kLanes) {
    const int64_t count = step.rows - step.panel * kPanel - row;
    if (loss.kind == Loss::cross_entropy)
      sum += cross_entropy_of_lanes(loss, step.panel * kPanel + row, outputs, z + row, slopes + row);
    if (loss.kind == Loss::brier)
      sum += brier_of_lanes(loss, step.panel * kPanel + row, outputs, z + row, slopes + row);
    const FloatVec by_row =
        loss.by_row ? load_bits<FloatVec>(loss.by_row + step.panel * kPanel + row) : FloatVec{} + 1.f;
    visit_loss(loss.kind, [&]<class Term>(Term) {
      sum += loss_of_lanes<Term>(loss, by_row, count, outputs, z + row, target + row, slopes + row);
    });
  }
  return sum;
}

MLPKIT_END_ISA
