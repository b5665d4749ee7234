// A member's outputs in eval, 32 rows at a time, and what they score (ops).
#include "ops/population_scores.h"

#include <algorithm>
#include <cmath>

#include "core/norm.h"

namespace mlpkit {

struct MemberScorer::Sums {
  double weight = 0.0, right = 0.0, absolute = 0.0;
  std::vector<double> residual, mean, spread;  // by output; spread: sum of squared deviations around the mean
};

MemberScorer::MemberScorer(const PopulationTask& task, const PopulationMember& member, bool best,
                           PopulationWorkspace& work)
    : task_(task),
      member_(member),
      work_(work),
      kernels_(mlp_step_kernels(member.network.bfloat16 ? Dtype::bfloat16 : Dtype::float32)) {
  const float* values = member.chosen_values(best);
  const int64_t column = kPanel / kernels_.per_lane;
  int64_t blocks = 0, copies = 0;
  for (size_t i = 0; i < member.layers.size(); ++i) {
    const MemberLayer& from = member.layers[i];
    StepLayer layer{};
    layer.in = from.in;
    layer.out = from.out;
    layer.activation = i + 1 < member.layers.size() ? member.network.activation : Activation::identity;
    layer.negative_slope = static_cast<float>(member.network.negative_slope);
    const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : values + offset; };
    layer.weight = layer.forward = layer.backward = values + from.weight;
    layer.in_place = from.across > 0;
    layer.bias = at(from.bias);
    layer.slope = at(from.slope);
    layer.norm.kind = from.norm_weight < 0 ? Norm::none : member.network.norm;
    layer.norm.eps = member.network.norm_eps;
    layer.norm.weight = at(from.norm_weight);
    layer.norm.bias = at(from.norm_bias);
    layers_.push_back(layer);
    blocks = std::max(blocks, panels_of(layer.in) * kPanel * column);
    copies += kernels_.lanes(layer.in) * layer.out + kernels_.lanes(layer.out) * layer.in;
  }
  set_norms(member.chosen_running(best));
  const int64_t outputs = layers_.back().out, count = static_cast<int64_t>(layers_.size());
  const int64_t scratch = (step_scratch(layers_.data(), count) + 15) / 16 * 16;
  // dz is written by the backward pass alone, which does not run.
  float* free =
      work.scores.at_least(blocks + scratch + 2 * outputs * kPanel + 3 * kPanel + (kernels_.weights ? copies : 0));
  for (StepLayer& layer : layers_) layer.inputs = free;
  scratch_ = free += blocks;
  outputs_ = free += scratch;
  target_ = free += outputs * kPanel;
  free += (outputs + 3) * kPanel;
  for (StepLayer& layer : layers_) {
    if (!kernels_.weights) break;
    float *forward = free, *backward = free += kernels_.lanes(layer.in) * layer.out;
    free += kernels_.lanes(layer.out) * layer.in;
    kernels_.weights(
        {Dtype::bfloat16, layer.in, layer.out, layer.weight, forward, kernels_.per_lane > 1 ? backward : forward});
    layer.forward = forward;
    layer.backward = backward;
  }
}

// A batch norm's running averages take the place of the batch's.
void MemberScorer::set_norms(const float* running) {
  int64_t floats = 0;
  for (const StepLayer& layer : layers_) floats += layer.norm.kind == Norm::batch ? 2 * layer.out : 0;
  norms_.resize(floats);
  float* free = norms_.data();
  for (size_t i = 0; i < layers_.size(); ++i) {
    StepLayer& layer = layers_[i];
    if (layer.norm.kind != Norm::batch) continue;
    float *mean = free, *inverse = free + layer.out;
    free += 2 * layer.out;
    for (int64_t n = 0; n < layer.out; ++n) {
      mean[n] = running[member_.layers[i].mean + n];
      inverse[n] = inverse_deviation(running[member_.layers[i].variance + n], layer.norm.eps);
    }
    layer.norm.mean = mean;
    layer.norm.inverse = inverse;
  }
}

// At most 32 rows; returns the sum of their losses.
double MemberScorer::forward(const float* x, const int32_t* index, int64_t count, const StepLoss& loss, float* to) {
  double value = 0.0;
  const int64_t layers = static_cast<int64_t>(layers_.size());
  kernels_.panel({member_.network.bfloat16 ? Dtype::bfloat16 : Dtype::float32, layers_.data(), layers, count, 0, x,
                  loss, 0, layers, scratch_, &value, index, to});
  return value;
}

void MemberScorer::outputs(const float* x, int64_t rows, float* to) {
  StepLoss loss{};
  loss.kind = Loss::mse;
  loss.target = target_;
  const int64_t in = layers_.front().in, out = layers_.back().out;
  std::fill_n(target_, kPanel * out, 0.f);
  for (int64_t row = 0; row < rows; row += kPanel)
    forward(x + row * in, nullptr, std::min(kPanel, rows - row), loss, to + row * out);
}

MemberScores MemberScorer::scores(const PopulationData& data, const at::Tensor& rows) {
  const int64_t count = rows.numel(), outputs = layers_.back().out;
  const int32_t* index = rows.const_data_ptr<int32_t>();
  const float* x = data.x.const_data_ptr<float>();
  const float* weights = data.weights.defined() ? data.weights.const_data_ptr<float>() : nullptr;
  const bool classes = of_classes(task_.loss);
  float *by_row = target_ + outputs * kPanel, *of_class = by_row + kPanel;
  int32_t* wanted = reinterpret_cast<int32_t*>(of_class + kPanel);
  StepLoss loss{};
  loss.kind = task_.loss;
  loss.delta = static_cast<float>(task_.delta);
  loss.scale = 1.f;
  loss.smoothing = {1.f, 0.f, static_cast<float>(outputs)};
  loss.by_row = by_row;
  loss.classes = wanted;
  loss.weights = of_class;
  loss.target = classes ? nullptr : target_;
  Sums sums;
  for (std::vector<double>* each : {&sums.residual, &sums.mean, &sums.spread}) each->assign(outputs, 0.0);
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kPanel) {
    const int64_t here = std::min(kPanel, count - begin);
    for (int64_t i = 0; i < kPanel; ++i) {
      const bool inside = i < here;
      by_row[i] = !inside ? 0.f : weights ? weights[index[begin + i]] : 1.f;
      of_class[i] = inside ? 1.f : 0.f;
      if (classes) wanted[i] = inside ? data.classes.const_data_ptr<int32_t>()[index[begin + i]] : kNoRow;
      if (!classes && inside)
        std::copy_n(data.target.const_data_ptr<float>() + index[begin + i] * outputs, outputs, target_ + i * outputs);
    }
    total += forward(x, index + begin, here, loss, outputs_);
    add_metric(loss, here, outputs_, sums);
  }
  const double value = total / (sums.weight * (classes ? 1.0 : static_cast<double>(outputs)));
  return {value, metric(sums, value)};
}

void MemberScorer::add_metric(const StepLoss& loss, int64_t count, const float* outputs, Sums& sums) const {
  const int64_t width = layers_.back().out;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = loss.by_row[i];
    const float* y = outputs + i * width;
    sums.weight += weight;
    if (task_.metric == PopulationMetric::accuracy) {
      const int64_t guess = loss.target ? (y[0] > 0.f) : std::max_element(y, y + width) - y;
      const int64_t truth = loss.target ? (loss.target[i] > 0.5f) : loss.classes[i];
      if (guess == truth) sums.right += weight;
      continue;
    }
    if (task_.metric == PopulationMetric::loss || weight == 0.0) continue;
    for (int64_t c = 0; c < width; ++c) {
      const double t = loss.target[i * width + c], error = y[c] - t, before = t - sums.mean[c];
      sums.absolute += weight * std::abs(error);
      sums.residual[c] += weight * error * error;
      // West: "Updating mean and variance estimates", 1979.
      sums.mean[c] += before * weight / sums.weight;
      sums.spread[c] += weight * before * (t - sums.mean[c]);
    }
  }
}

double MemberScorer::metric(const Sums& sums, double loss) const {
  const double outputs = static_cast<double>(layers_.back().out);
  double residual = 0.0, explained = 0.0;
  for (size_t c = 0; c < sums.residual.size(); ++c) {
    residual += sums.residual[c];
    // Of a constant target: 1 if it is met, else 0.
    explained += sums.spread[c] > 0.0 ? 1.0 - sums.residual[c] / sums.spread[c] : sums.residual[c] == 0.0 ? 1.0 : 0.0;
  }
  switch (task_.metric) {
    case PopulationMetric::loss:
      return loss;
    case PopulationMetric::accuracy:
      return sums.right / sums.weight;
    case PopulationMetric::r2:
      return explained / outputs;
    case PopulationMetric::mae:
      return sums.absolute / (sums.weight * outputs);
    case PopulationMetric::rmse:
      return std::sqrt(residual / (sums.weight * outputs));
  }
  return loss;
}

}  // namespace mlpkit
