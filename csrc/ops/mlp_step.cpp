// A whole training step of an MLP in one call: forward, loss, backward, inspection, then the update or nothing (ops).
#include "ops/mlp_step.h"

#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "core/loss.h"
#include "cpu/update.h"
#include "ops/linear_act_dropout.h"

namespace mlpkit {
namespace {

// Parameters, state and gradients within this bound, and settings as mlpkit.guard.bounds asks for, cannot overflow in
// an update.
constexpr double kLargest = 1099511627776.0;  // 2^40

struct Layer {
  at::Tensor input, z, bits, dweight, dbias;
};

struct Gradient {  // of the mean loss by the output
  bool valid;
  double loss;
  at::Tensor slopes;
};

template <class Term>
Gradient elementwise(const at::Tensor& output, const at::Tensor& target, const Term& term) {
  Gradient result{true, 0.0, at::empty_like(output)};
  const int64_t count = output.numel();
  const float *z = output.const_data_ptr<float>(), *t = target.const_data_ptr<float>();
  float* slopes = result.slopes.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    const LossTerm at_element = term(z[i], t[i]);
    result.loss += at_element.value;
    slopes[i] = at_element.slope / static_cast<float>(count);
  }
  result.loss /= static_cast<double>(count);
  return result;
}

Gradient by_class(const at::Tensor& output, const at::Tensor& target) {
  Gradient result{true, 0.0, at::empty_like(output)};
  const int64_t rows = output.size(0), classes = output.size(1);
  const float* z = output.const_data_ptr<float>();
  const int64_t* t = target.const_data_ptr<int64_t>();
  float* slopes = result.slopes.mutable_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    if (t[row] < 0 || t[row] >= classes) return {false, 0.0, {}};
    result.loss +=
        cross_entropy(z + row * classes, classes, t[row], 1.f / static_cast<float>(rows), slopes + row * classes);
  }
  result.loss /= static_cast<double>(rows);
  return result;
}

Gradient loss_of(const std::string& name, const at::Tensor& output, const at::Tensor& target) {
  if (name == "cross_entropy") return by_class(output, target);
  if (name == "bce") return elementwise(output, target, [](float z, float t) { return bce(z, t); });
  if (name == "mse") return elementwise(output, target, [](float z, float t) { return mse(z, t); });
  if (name == "l1") return elementwise(output, target, [](float z, float t) { return l1(z, t); });
  TORCH_CHECK_VALUE(name == "huber", "mlp_step: loss is '", name, "'; it must be cross_entropy, bce, mse, l1 or huber");
  return elementwise(output, target, [](float z, float t) { return huber(z, t); });
}

Optimizer optimizer_of(const std::string& name) {
  if (name == "adam") return Optimizer::adam;
  if (name == "adamw") return Optimizer::adamw;
  if (name == "rmsprop") return Optimizer::rmsprop;
  TORCH_CHECK_VALUE(name == "sgd", "mlp_step: optimizer is '", name, "'; it must be sgd, adam, adamw or rmsprop");
  return Optimizer::sgd;
}

const char* activation_of(const MlpStep& step, size_t layer) {
  return layer + 1 < step.weights.size() ? step.activation.c_str() : "identity";
}
double p_of(const MlpStep& step, size_t layer) { return layer + 1 < step.weights.size() ? step.p[layer] : 0.0; }

at::Tensor forward(const MlpStep& step, std::vector<Layer>& layers) {
  at::Tensor y = step.x;
  for (size_t i = 0; i < layers.size(); ++i) {
    const double p = p_of(step, i);
    auto [next, z, bits] =
        linear_act_dropout_forward(y, step.weights[i], step.biases[i], std::nullopt, p > 0 ? step.seed : std::nullopt,
                                   activation_of(step, i), step.negative_slope, p, static_cast<int64_t>(i), true);
    layers[i] = {y, z, bits, {}, {}};
    y = next;
  }
  return y;
}

void backward(const MlpStep& step, at::Tensor dy, std::vector<Layer>& layers) {
  for (size_t i = layers.size(); i-- > 0;) {
    Layer& layer = layers[i];
    auto [dx, dweight, dbias, dslope] = linear_act_dropout_backward(
        dy, layer.input, step.weights[i], std::nullopt, layer.z, layer.bits, activation_of(step, i),
        step.negative_slope, p_of(step, i), {i > 0, true, step.biases[i].has_value(), false});
    layer.dweight = dweight;
    layer.dbias = dbias;
    dy = dx;
  }
}

struct Parameter {
  at::Tensor value, gradient;
  std::optional<at::Tensor> first, second, step;
  int64_t group;
};

std::vector<Parameter> parameters_of(const MlpStep& step, const std::vector<Layer>& layers) {
  std::vector<Parameter> result;
  const auto add = [&](const at::Tensor& value, const at::Tensor& gradient) {
    const size_t i = result.size();
    result.push_back({value, gradient, step.firsts[i], step.seconds[i], step.steps[i], step.group_of[i]});
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    add(step.weights[i], layers[i].dweight);
    if (step.biases[i]) add(*step.biases[i], layers[i].dbias);
  }
  return result;
}

float* data(const at::Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
float* data_or_null(const std::optional<at::Tensor>& tensor) { return tensor ? data(*tensor) : nullptr; }

struct Findings {
  double squares = 0.0;
  float largest = 0.f;
  bool negative = false;
};

Findings inspect_all(const std::vector<Parameter>& parameters) {
  Findings found;
  for (const Parameter& parameter : parameters) {
    if (parameter.group < 0) continue;
    cpu::inspect({data(parameter.value), data(parameter.gradient), data_or_null(parameter.first),
                  data_or_null(parameter.second), parameter.value.numel(), &found.squares, &found.largest,
                  &found.negative});
    if (parameter.step && !(*data(*parameter.step) >= 0.f && *data(*parameter.step) < 16777216.f))
      found.negative = true;
  }
  return found;
}

OptimizerSettings settings_of(const MlpStep& step, const Parameter& parameter, double taken) {
  const std::vector<double>& g = step.groups[parameter.group];
  const double lr = g[0], weight_decay = g[1], momentum = g[2], dampening = g[3], beta1 = g[5], beta2 = g[6],
               eps = g[7];
  const bool corrected = step.optimizer == "adam" || step.optimizer == "adamw";
  const double correction1 = corrected ? 1.0 - std::pow(beta1, taken) : 1.0;
  const double correction2 = corrected ? std::sqrt(1.0 - std::pow(beta2, taken)) : 1.0;
  const auto rounded = [](double value) { return static_cast<float>(value); };
  return {optimizer_of(step.optimizer),
          g[4] != 0.0,
          rounded(lr),
          rounded(weight_decay),
          rounded(momentum),
          rounded(1.0 - dampening),
          rounded(beta2),
          rounded(1.0 - beta1),
          rounded(1.0 - beta2),
          rounded(eps),
          rounded(lr / correction1),
          rounded(correction2),
          rounded(1.0 - lr * weight_decay)};
}

void update_all(const MlpStep& step, const std::vector<Parameter>& parameters, float scale) {
  for (const Parameter& parameter : parameters) {
    if (parameter.group < 0) continue;
    double taken = 1.0;
    if (parameter.step) taken = *data(*parameter.step) += 1.f;
    cpu::update({settings_of(step, parameter, taken), scale, parameter.value.numel(), data(parameter.value),
                 data(parameter.gradient), data_or_null(parameter.first), data_or_null(parameter.second)});
    // The change is autograd's to know, as that of any in-place operation.
    parameter.value.unsafeGetTensorImpl()->bump_version();
    for (const auto& state : {parameter.first, parameter.second, parameter.step})
      if (state) state->unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

MlpStepOutcome mlp_step(const MlpStep& step) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  std::vector<Layer> layers(step.weights.size());
  const at::Tensor output = forward(step, layers);
  const Gradient gradient = loss_of(step.loss, output, step.target.contiguous());
  if (!gradient.valid || !std::isfinite(gradient.loss)) return {false, gradient.loss, 0.0};
  backward(step, gradient.slopes, layers);
  const std::vector<Parameter> parameters = parameters_of(step, layers);
  const Findings found = inspect_all(parameters);
  const double norm = std::sqrt(found.squares);
  const double applied = step.clip_norm > 0 ? std::min(norm, step.clip_norm) : norm;
  // Written so that NaN is refused.
  if (!(applied <= kLargest && found.largest <= kLargest) || !std::isfinite(norm) || found.negative)
    return {false, gradient.loss, norm};
  update_all(step, parameters, norm > applied ? static_cast<float>(applied / norm) : 1.f);
  return {true, gradient.loss, norm};
}

}  // namespace mlpkit
