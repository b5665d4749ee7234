// A member's layers as the kernels of cpu/mlp_step.h take them, and the passes over a batch (ops).
#include <algorithm>
#include <cmath>

#include "cpu/update.h"
#include "ops/population_run.h"

namespace mlpkit {

MemberRun::MemberRun(const PopulationTask& task, const PopulationData& data, const PopulationData& validation,
                     PopulationMember& member, PopulationWorkspace& work)
    : task_(task),
      data_(data),
      validation_(validation),
      member_(member),
      work_(work),
      kernels_(mlp_step_kernels(member.network.bfloat16 ? Dtype::bfloat16 : Dtype::float32)),
      batch_(std::min(member.recipe.batch_size, member.rows.numel())) {
  lay_out();
  lay_out_activations();
  cpu::inspect({member.values(), member.first(), member.second(), member.parameters, &largest_, &negative_});
}

// Layers with their parameters and gradients. Between tensors the gradients are zero, as the parameters are.
void MemberRun::lay_out() {
  float* gradients = work_.gradients.at_least(member_.parameters);
  std::fill_n(gradients, member_.parameters, 0.f);
  float* values = member_.values();
  const MemberNetwork& network = member_.network;
  work_.norms.assign(member_.layers.size(), {});
  for (size_t i = 0; i < member_.layers.size(); ++i) {
    const MemberLayer& from = member_.layers[i];
    const bool hidden = i + 1 < member_.layers.size();
    StepLayer layer{};
    layer.in = from.in;
    layer.out = from.out;
    layer.activation = hidden ? network.activation : Activation::identity;
    layer.negative_slope = static_cast<float>(network.negative_slope);
    layer.dropout.seed = network.seed;
    layer.dropout.stream = static_cast<uint32_t>(i);
    layer.dropout.threshold = hidden ? dropout_threshold(member_.recipe.dropout[i]) : 0;
    layer.dropout.scale = dropout_scale(layer.dropout.threshold);
    const auto at = [](float* base, int64_t offset) { return offset < 0 ? nullptr : base + offset; };
    layer.weight = layer.forward = layer.backward = values + from.weight;
    layer.in_place = from.across > 0;
    layer.bias = at(values, from.bias);
    layer.slope = at(values, from.slope);
    layer.dweight = gradients + from.weight;
    layer.dbias = at(gradients, from.bias);
    work_.norms[i].dweight = at(gradients, from.norm_weight);
    work_.norms[i].dbias = at(gradients, from.norm_bias);
    slope_gradients_.push_back(at(gradients, from.slope));
    lay_out_norm(i, from, layer);
    layers_.push_back(layer);
  }
}

void MemberRun::lay_out_norm(size_t i, const MemberLayer& from, StepLayer& layer) {
  if (from.norm_weight < 0) return;
  const MemberNetwork& network = member_.network;
  NormWork& work = work_.norms[i];
  layer.norm.kind = network.norm;
  layer.norm.eps = network.norm_eps;
  layer.norm.weight = member_.values() + from.norm_weight;
  layer.norm.bias = member_.values() + from.norm_bias;
  work.sums.resize(2 * panels_of(batch_) * layer.out);
  layer.norm.sums = work.sums.data();
  if (network.norm == Norm::layer) return;
  by_panel_ = true;
  work.moments.resize(2 * panels_of(batch_) * layer.out);
  for (std::vector<float>* each : {&work.mean, &work.inverse, &work.mean_g, &work.mean_gx}) each->resize(layer.out);
  layer.norm.moments = work.moments.data();
  layer.norm.mean = work.mean.data();
  layer.norm.inverse = work.inverse.data();
  layer.norm.mean_g = work.mean_g.data();
  layer.norm.mean_gx = work.mean_gx.data();
}

// What depends on the largest batch.
void MemberRun::lay_out_activations() {
  const int64_t panels = panels_of(batch_), column = kPanel / kernels_.per_lane;
  int64_t floats = 0, lanes = 0, pieces = 0;
  for (const StepLayer& layer : layers_) {
    const int64_t inputs = layer.in_place ? 0 : panels_of(layer.in) * kPanel;
    const int64_t outputs = layer.in_place ? across_of(layer.out) : layer.out;
    floats += panels * column * (inputs + outputs) + (layer.slope ? panels * layer.out : 0);
    lanes += kernels_.lanes(layer.in) * layer.out + kernels_.lanes(layer.out) * layer.in;
    pieces += panels_of(layer.in);
  }
  float *free = work_.activations.at_least(floats),
        *copies = kernels_.weights ? work_.weights.at_least(lanes) : nullptr;
  const auto take = [](float*& from, int64_t wanted) {
    float* taken = from;
    from += wanted;
    return taken;
  };
  work_.values.resize(panels);
  work_.squares.resize(pieces);
  for (StepLayer& layer : layers_) {
    if (!layer.in_place) layer.inputs = take(free, panels * column * panels_of(layer.in) * kPanel);
    layer.dz = take(free, panels * column * (layer.in_place ? across_of(layer.out) : layer.out));
    layer.dslope = layer.slope ? take(free, panels * layer.out) : nullptr;
    if (kernels_.weights) {
      layer.forward = layer.backward = take(copies, kernels_.lanes(layer.in) * layer.out);
      if (kernels_.per_lane > 1) layer.backward = take(copies, kernels_.lanes(layer.out) * layer.in);
    }
  }
  for (StepLayer& layer : layers_)
    for (int64_t i = 0; i < (layer.in_place ? 1 : panels_of(layer.in)); ++i)
      pieces_.push_back({&layer, batch_, i, work_.squares.data() + pieces_.size()});
  const int64_t count = static_cast<int64_t>(layers_.size());
  scratch_floats_ = (step_scratch(layers_.data(), count) + 15) / 16 * 16;
  work_.scratch.at_least(scratch_floats_ * (by_panel_ ? panels : 1));
}

// The weights as they are multiplied.
void MemberRun::set_weights() {
  if (!kernels_.weights) return;
  for (const StepLayer& layer : layers_)
    kernels_.weights({Dtype::bfloat16, layer.in, layer.out, layer.weight, const_cast<float*>(layer.forward),
                      const_cast<float*>(layer.backward)});
}

void MemberRun::run_panels(const int32_t* rows, int64_t count, const StepLoss& loss, int64_t from, int64_t until) {
  const Dtype dtype = member_.network.bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  float* scratch = work_.scratch.at_least(0);
  for (int64_t panel = 0; panel < panels_of(count); ++panel)
    kernels_.panel({dtype, layers_.data(), static_cast<int64_t>(layers_.size()), count, panel,
                    data_.x.const_data_ptr<float>(), loss, from, until,
                    scratch + (by_panel_ ? panel * scratch_floats_ : 0), &work_.values[panel], rows});
}

// Returns the loss; fills dz and inputs of every layer. A batch norm stops all panels twice: until all know its
// moments, and until all know the sums of its gradients.
double MemberRun::forward_and_backward(const int32_t* rows, int64_t count, const StepLoss& loss) {
  const size_t layers = layers_.size();
  int64_t from = 0;
  for (size_t segment = 0; segment + 1 < 2 * layers && by_panel_; ++segment) {
    const size_t i = segment < layers ? segment : 2 * layers - 2 - segment;
    const MemberLayer& layer = member_.layers[i];
    if (layer.mean < 0) continue;
    run_panels(rows, count, loss, from, static_cast<int64_t>(segment + 1));
    from = static_cast<int64_t>(segment + 1);
    const NormAverages averages{member_.running() + layer.mean, member_.running() + layer.variance,
                                member_.network.norm_momentum};
    if (segment < layers)
      combine_moments(layers_[i], count, averages, work_.norms[i]);
    else
      combine_sums(layers_[i], count, work_.norms[i]);
  }
  run_panels(rows, count, loss, from, 0);
  double sum = 0.0;
  for (int64_t panel = 0; panel < panels_of(count); ++panel) sum += work_.values[panel];
  return sum * loss_scale_;
}

bool MemberRun::averages_finite() const {
  for (const NormWork& norm : work_.norms)
    for (const std::vector<float>* next : {&norm.next_mean, &norm.next_variance})
      for (const float value : *next)
        if (!std::isfinite(value)) return false;
  return true;
}

void MemberRun::move_averages() {
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (member_.layers[i].mean < 0) continue;
    const NormWork& norm = work_.norms[i];
    std::copy(norm.next_mean.begin(), norm.next_mean.end(), member_.running() + member_.layers[i].mean);
    std::copy(norm.next_variance.begin(), norm.next_variance.end(), member_.running() + member_.layers[i].variance);
  }
}

}  // namespace mlpkit
