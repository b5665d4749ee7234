// The update of an MLP's parameters and of the optimizer's state, in place (ops).
#include <ATen/Parallel.h>

#include <cmath>

#include "cpu/update.h"
#include "ops/mlp_step_work.h"

namespace mlpkit {
namespace {

constexpr int64_t kUpdateGrain = 65536;

}  // namespace

void MlpStep::Work::update(double scale, const std::vector<MlpStepGroup>& groups) {
  double known = -1.0, rest1 = 1.0, rest2 = 1.0;
  int64_t group = -1;
  const bool corrected = optimizer == Optimizer::adam || optimizer == Optimizer::adamw;
  for (const MlpStepParameter& parameter : parameters) {
    const MlpStepState& state = parameter.state;
    const MlpStepGroup& g = groups[state.group];
    const double taken = state.step ? *data(state.step) += 1.f : 1.0;
    if (corrected && (taken != known || state.group != group)) {
      rest1 = 1.0 - std::pow(g.beta1, taken);
      rest2 = std::sqrt(1.0 - std::pow(g.beta2, taken));
      known = taken;
      group = state.group;
    }
    const auto rounded = [](double value) { return static_cast<float>(value); };
    const OptimizerSettings settings{optimizer,
                                     g.nesterov,
                                     rounded(g.lr),
                                     rounded(g.weight_decay),
                                     rounded(g.momentum),
                                     rounded(1.0 - g.dampening),
                                     rounded(g.beta2),
                                     rounded(1.0 - g.beta1),
                                     rounded(1.0 - g.beta2),
                                     rounded(g.eps),
                                     rounded(g.lr / rest1),
                                     rounded(rest2),
                                     rounded(1.0 - g.lr * g.weight_decay)};
    float *p = data(parameter.value), *first = data_or_null(state.first), *second = data_or_null(state.second);
    const auto run = [&](int64_t begin, int64_t end) {
      cpu::update({settings, rounded(scale), end - begin, p + begin, parameter.gradient + begin,
                   first ? first + begin : nullptr, second ? second + begin : nullptr});
    };
    const int64_t count = parameter.value->numel();
    if (count <= kUpdateGrain)
      run(0, count);
    else
      at::parallel_for(0, count, kUpdateGrain, run);
    // The change is autograd's to know, as that of any in-place operation.
    parameter.value->bump_version();
    for (const BorrowedTensor tensor : {state.first, state.second, state.step})
      if (tensor) tensor->bump_version();
  }
}

}  // namespace mlpkit
