// Nets with norms between their layers, and rows that do not count but are not numbers (tests).
#pragma once
#include "step_judge.h"

namespace native {

inline void check_norms(Format format, void (*kernel)(const mlpkit::StepPanel&), Draw& draw, Report& report) {
  const std::vector<int64_t> rows = {1, 2, 31, 32, 33, 70, 97};
  const std::vector<NormCase> kinds = {{Norm::layer, false}, {Norm::batch, false}, {Norm::batch, true}, {}};
  const auto check = [&](int64_t hidden, Activation activation, double p, Real shift, const auto& norm) {
    NetCase net = drawn(format, hidden, activation, p, draw.of(rows), static_cast<Loss>(draw.below(6)), draw);
    for (int64_t i = 0; i <= hidden; ++i) net.norms.push_back(i < hidden ? norm() : NormCase{});
    net.shift = shift;
    check_step(net, kernel, draw, report);
  };
  for (int activation = 0; activation <= static_cast<int>(Activation::tanh); ++activation)
    for (const double p : {0.0, 0.3, 1.0})
      for (size_t kind = 0; kind < 3; ++kind)
        check(1 + draw.below(3), static_cast<Activation>(activation), p, 0, [&] { return kinds[kind]; });
  const auto any = [&] { return draw.of(kinds); };
  for (int i = 0; i < 60; ++i)
    check(2 + draw.below(3), static_cast<Activation>(draw.below(9)), 0.3, draw.below(4) ? 0 : 300, any);
}

// A row that is ignored shows in its slopes what is no number in it, and nowhere else; lanes beyond the rows are zero.
inline void check_ignored(Format format, void (*kernel)(const mlpkit::StepPanel&), Draw& draw, Report& report) {
  for (const Real bad : {static_cast<Real>(NAN), static_cast<Real>(INFINITY), -static_cast<Real>(INFINITY)})
    for (const int64_t rows : {1, 31, 33, 70})
      for (int64_t hidden = 0; hidden < (std::isnan(bad) ? 3 : 1); ++hidden) {
        const NetCase net = drawn(format, hidden, Activation::relu, 0, rows, Loss::cross_entropy, draw);
        Step step(net, draw);
        const int64_t row = draw.below(rows);
        step.ignore(row, bad);
        step.run(kernel);
        step.compare_ignored(row, report);
      }
}

}  // namespace native
