// One member of a population: its layout, and what follows from its recipe (ops).
#include "ops/population_member.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "cpu/mlp_step.h"

namespace mlpkit {
namespace {

constexpr int64_t kAlignment = 16;  // floats
// What a step costs beside its products, as operations: layers of few columns would otherwise count as free.
constexpr double kStepOverhead = 5e5;

int64_t padded(int64_t floats) { return (floats + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

bool MemberRecipe::modest(double rate) const {
  for (const double setting : {rate, momentum, weight_decay, l1})
    if (!(std::abs(setting) <= kMemberLargestSetting)) return false;
  return beta1 <= kMemberLargestBeta && beta2 <= kMemberLargestBeta && eps >= kMemberSmallestEps &&
         momentum <= kMemberLargestBeta;
}

PopulationMember::PopulationMember(MemberNetwork net, MemberRecipe how, at::Tensor trained, at::Tensor validated)
    : network(std::move(net)), recipe(std::move(how)), rows(std::move(trained)), validation_rows(std::move(validated)) {
  TORCH_CHECK_VALUE(network.widths.size() >= 2 && network.widths.size() <= kMostLayers + 1,
                    "population: ", network.widths.size() - 1, " layers came; it must be 1 to ", kMostLayers);
  TORCH_CHECK_VALUE(recipe.dropout.size() + 2 == network.widths.size(), "population: dropout has ",
                    recipe.dropout.size(), " entries; it must have ", network.widths.size() - 2);
  TORCH_CHECK_VALUE(rows.numel() > 0, "population: a member has no rows");
  lay_out();
}

bool PopulationMember::has_first() const {
  if (network.optimizer == Optimizer::adam || network.optimizer == Optimizer::adamw) return true;
  return network.with_momentum;
}

void PopulationMember::lay_out() {
  const auto take = [](int64_t& end, bool wanted, int64_t floats) {
    const int64_t begin = end;
    if (wanted) end += padded(floats);
    return wanted ? begin : -1;
  };
  for (size_t i = 0; i + 1 < network.widths.size(); ++i) {
    const bool hidden = i + 2 < network.widths.size(), normed = hidden && network.norm != Norm::none;
    const bool averaged = hidden && network.norm == Norm::batch;
    MemberLayer layer{};
    layer.in = network.widths[i];
    layer.out = network.widths[i + 1];
    if (i == 0 && !network.bfloat16 && pays_in_place(layer.in, layer.out)) layer.across = across_of(layer.out);
    layer.weight = take(parameters, true, layer.in * (layer.across ? layer.across : layer.out));
    layer.bias = take(parameters, !normed, layer.out);
    layer.norm_weight = take(parameters, normed, layer.out);
    layer.norm_bias = take(parameters, normed, layer.out);
    layer.slope = take(parameters, hidden && network.activation == Activation::prelu, 1);
    layer.mean = take(averages, averaged, layer.out);
    layer.variance = take(averages, averaged, layer.out);
    layers.push_back(layer);
  }
  const int64_t kept = validates() ? parameters + averages : 0;
  state = at::zeros({moments_end() + averages + kept}, at::kFloat);
}

void PopulationMember::keep_best() {
  std::copy(values(), values() + parameters, best_values());
  std::copy(running(), running() + averages, best_values() + parameters);
}

int64_t PopulationMember::steps_per_epoch() const {
  const int64_t batch = std::min(recipe.batch_size, rows.numel());
  const int64_t left_out = network.norm == Norm::batch && layers.size() > 1 && rows.numel() % batch == 1;
  return std::max<int64_t>(1, (rows.numel() + batch - 1) / batch - left_out);
}

double PopulationMember::work_per_epoch() const {
  double per_row = 0.0;
  for (const MemberLayer& layer : layers) per_row += 2.0 * static_cast<double>(layer.in * layer.out);
  const double scored = validates() ? static_cast<double>(validation_rows.numel()) : 0.0;
  return per_row * (3.0 * static_cast<double>(rows.numel()) + scored) +
         static_cast<double>(steps_per_epoch()) * (kStepOverhead + 16.0 * static_cast<double>(parameters));
}

GuardedGroup PopulationMember::group(double lr) const {
  GuardedGroup group{};
  group.lr = lr;
  group.beta1 = recipe.beta1;
  group.beta2 = recipe.beta2;
  group.eps = recipe.eps;
  group.momentum = recipe.momentum;
  group.weight_decay = recipe.weight_decay;
  group.l1 = recipe.l1;
  group.nesterov = recipe.nesterov;
  return group;
}

// Of the step after those that were taken.
OptimizerSettings PopulationMember::settings(double lr) const {
  const double t = static_cast<double>(progress.taken + 1);
  const bool corrected = network.optimizer == Optimizer::adam || network.optimizer == Optimizer::adamw;
  return rounded<float>(settings_at(network.optimizer, group(lr), t, corrected ? std::pow(recipe.beta1, t) : 0.0,
                                    corrected ? std::pow(recipe.beta2, t) : 0.0));
}

}  // namespace mlpkit
