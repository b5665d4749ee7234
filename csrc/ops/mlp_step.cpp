// A whole training step of an MLP in one call (ops): memory, threads and torch's tensors around the kernels of
// cpu/mlp_step.h and cpu/update.h.
#include "ops/mlp_step.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/randint.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "cpu/mlp_step.h"
#include "cpu/update.h"
#include "ops/linear_act_dropout.h"

namespace mlpkit {
namespace {

// Parameters, state and gradients within this bound, and settings as mlpkit.guard.bounds asks for, cannot overflow in
// an update.
constexpr double kLargest = 1099511627776.0;  // 2^40
constexpr double kFlopsWorthThreads = 4e6;
constexpr int64_t kUpdateGrain = 65536;
// Sums of squares that were formed in fp32 are taken for what they are within these bounds; beyond, in fp64 again.
constexpr double kSmallestSquares = 1e-24, kLargestSquares = 1e30;

Optimizer optimizer_of(const std::string& name) {
  if (name == "adam") return Optimizer::adam;
  if (name == "adamw") return Optimizer::adamw;
  if (name == "rmsprop") return Optimizer::rmsprop;
  TORCH_CHECK_VALUE(name == "sgd", "mlp_step: optimizer is '", name, "'; it must be sgd, adam, adamw or rmsprop");
  return Optimizer::sgd;
}

float* data(const at::Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
float* data_or_null(const std::optional<at::Tensor>& tensor) { return tensor ? data(*tensor) : nullptr; }

// Floats, 64-byte aligned, that stay where they are until more are wanted.
class Memory {
 public:
  float* at_least(int64_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
      TORCH_CHECK(memory_, "mlp_step: no memory for ", floats, " floats of workspace");
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// torch's generator for the CPU, which is put back unless the step keeps what it drew.
class Seed {
 public:
  explicit Seed(bool draws) : generator_(at::detail::getDefaultCPUGenerator()) {
    if (!draws) return;
    auto* engine = at::check_generator<at::CPUGeneratorImpl>(generator_);
    {
      const std::lock_guard<std::mutex> lock(generator_.mutex());
      before_ = engine->engine();
    }
    // As Python draws a seed, so that the general way has the same masks.
    const at::Tensor state = at::randint(INT64_MIN, INT64_MAX, {2}, at::kLong);
    seed = state.const_data_ptr<int64_t>()[0];
    offset = state.const_data_ptr<int64_t>()[1];
  }
  ~Seed() {
    if (!before_ || kept) return;
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    at::check_generator<at::CPUGeneratorImpl>(generator_)->set_engine(*before_);
  }
  int64_t seed = 0, offset = 0;
  bool kept = false;

 private:
  at::Generator generator_;
  std::optional<at::mt19937> before_;
};

// The kernels for a dtype here: bfloat16 goes in pairs where the processor multiplies them.
struct Kernels {
  int64_t per_lane;
  void (*weights)(const StepWeights&);  // nullptr where the weight itself is multiplied
  void (*panel)(const StepPanel&);
  void (*gradient)(const StepGradient&);
  int64_t lanes(int64_t numbers) const { return (numbers + per_lane - 1) / per_lane; }
};

Kernels kernels_for(Dtype dtype) {
#if defined(__x86_64__)
  if (dtype == Dtype::bfloat16 && cpu::capability() == cpu::Capability::avx512_bf16)
    return {2, isa_avx512_bf16::step_weights_of_pairs, isa_avx512_bf16::step_panel_of_pairs,
            isa_avx512_bf16::step_gradient_of_pairs};
#endif
  return {1, dtype == Dtype::float32 ? nullptr : cpu::step_weights, cpu::step_panel, cpu::step_gradient};
}

struct Parameter {
  at::Tensor value;
  MlpStepState state;
  float* gradient;
};

}  // namespace

struct MlpStep::Work {
  std::vector<MlpStepLayer> tensors;
  Dtype dtype;
  Activation activation;
  float negative_slope;
  MlpStepLoss loss;
  Optimizer optimizer;
  std::vector<Parameter> parameters;
  Kernels kernels;

  std::vector<StepLayer> layers;
  std::vector<double> values, squares;  // the loss of each panel; squares of each piece of gradient
  std::vector<StepGradient> pieces;
  Memory gradients, weights, activations, scratch, rows_memory;
  int64_t rows = 0;
  double loss_scale = 1.0;

  void lay_out();
  void set_weights();
  void set_rows(int64_t count, const std::vector<double>& p, const Seed& seed);
  std::optional<StepLoss> loss_of(const at::Tensor& target);
  double flops() const;
  double forward_and_backward(const float* x, const StepLoss& loss);
  double gradient_norm();
  double slope_gradients();
  bool bounded();
  void update(double scale, const std::vector<MlpStepGroup>& groups);
};

// Layers as the kernels take them, with gradients in one block of memory; what depends on the batch comes later.
void MlpStep::Work::lay_out() {
  int64_t floats = 0;
  for (const Parameter& parameter : parameters) floats += parameter.value.numel();
  float* free = gradients.at_least(floats);
  size_t next = 0;
  const auto gradient = [&] {
    Parameter& parameter = parameters[next++];
    parameter.gradient = free;
    free += parameter.value.numel();
    return parameter.gradient;
  };
  for (const MlpStepLayer& tensor : tensors) {
    StepLayer layer{};
    layer.in = tensor.weight.size(1);
    layer.out = tensor.weight.size(0);
    const bool last = layers.size() + 1 == tensors.size();
    layer.activation = last ? Activation::identity : activation;
    layer.negative_slope = negative_slope;
    layer.slope_by_column = tensor.slope && tensor.slope->numel() > 1;
    layer.dweight = gradient();
    if (tensor.bias) layer.dbias = gradient();
    if (tensor.slope) gradient();
    layers.push_back(layer);
  }
}

// Where the parameters lie now, and the weights as they are multiplied.
void MlpStep::Work::set_weights() {
  kernels = kernels_for(dtype);
  int64_t floats = 0;
  for (const StepLayer& layer : layers)
    floats += kernels.lanes(layer.in) * layer.out + kernels.lanes(layer.out) * layer.in;
  float* free = kernels.weights ? weights.at_least(floats) : nullptr;
  for (size_t i = 0; i < layers.size(); ++i) {
    StepLayer& layer = layers[i];
    layer.weight = data(tensors[i].weight);
    layer.bias = data_or_null(tensors[i].bias);
    layer.slope = data_or_null(tensors[i].slope);
    layer.forward = layer.backward = layer.weight;
    if (!kernels.weights) continue;
    float* forward = free;
    free += kernels.lanes(layer.in) * layer.out;
    float* backward = kernels.per_lane > 1 ? free : forward;
    if (kernels.per_lane > 1) free += kernels.lanes(layer.out) * layer.in;
    kernels.weights({dtype, layer.in, layer.out, layer.weight, forward, backward});
    layer.forward = forward;
    layer.backward = backward;
  }
}

// Everything that depends on the number of rows and on p.
void MlpStep::Work::set_rows(int64_t count, const std::vector<double>& p, const Seed& seed) {
  rows = count;
  const int64_t panels = panels_of(rows), column = kPanel / kernels.per_lane;
  for (size_t i = 0; i < layers.size(); ++i) {
    Dropout& dropout = layers[i].dropout;
    dropout = {static_cast<uint64_t>(seed.seed), static_cast<uint32_t>(seed.offset), static_cast<uint32_t>(i)};
    dropout.threshold = i + 1 < layers.size() ? dropout_threshold(p[i]) : 0;
    dropout.scale = dropout_scale(dropout.threshold);
  }
  int64_t floats = 0, work = 0;
  for (const StepLayer& layer : layers) {
    floats += panels * column * (panels_of(layer.in) * kPanel + layer.out) + (layer.slope ? panels * layer.out : 0);
    work += panels_of(layer.in);
  }
  float* free = activations.at_least(floats);
  const auto take = [&](int64_t wanted) {
    float* taken = free;
    free += wanted;
    return taken;
  };
  values.resize(panels);
  squares.resize(work);
  pieces.clear();
  for (StepLayer& layer : layers) {
    layer.inputs = take(panels * column * panels_of(layer.in) * kPanel);
    layer.dz = take(panels * layer.out * column);
    layer.dslope = layer.slope ? take(panels * layer.out) : nullptr;
    for (int64_t i = 0; i < panels_of(layer.in); ++i) {
      double* piece = squares.data() + pieces.size();
      pieces.push_back({&layer, rows, i, piece});
    }
  }
}

// The loss as the kernels take it; nothing where a class is out of range.
std::optional<StepLoss> MlpStep::Work::loss_of(const at::Tensor& target) {
  StepLoss result{};
  result.kind = loss.kind;
  result.delta = static_cast<float>(loss.delta);
  const int64_t outputs = layers.back().out, padded = panels_of(rows) * kPanel;
  if (loss.kind != Loss::cross_entropy) {
    result.target = target.const_data_ptr<float>();
    loss_scale = loss.mean ? 1.0 / static_cast<double>(rows * outputs) : 1.0;
    result.scale = static_cast<float>(loss_scale);
    return result;
  }
  const float* by_class = data_or_null(loss.class_weights);
  const int64_t* wanted = target.const_data_ptr<int64_t>();
  float* weights = rows_memory.at_least(2 * padded);
  int32_t* classes = reinterpret_cast<int32_t*>(weights + padded);
  double counted = 0.0;
  for (int64_t row = 0; row < padded; ++row) {
    const bool counts = row < rows && wanted[row] != loss.ignore_index;
    if (counts && (wanted[row] < 0 || wanted[row] >= outputs)) return std::nullopt;
    classes[row] = counts ? static_cast<int32_t>(wanted[row]) : -1;
    weights[row] = counts ? (by_class ? by_class[wanted[row]] : 1.f) : 0.f;
    counted += weights[row];
  }
  double total = by_class ? 0.0 : static_cast<double>(outputs);
  for (int64_t i = 0; by_class && i < outputs; ++i) total += by_class[i];
  loss_scale = loss.mean ? 1.0 / counted : 1.0;
  result.scale = static_cast<float>(loss_scale);
  result.smoothing = {static_cast<float>(1.0 - loss.label_smoothing),
                      static_cast<float>(loss.label_smoothing / static_cast<double>(outputs)),
                      static_cast<float>(total)};
  result.classes = classes;
  result.weights = weights;
  result.by_class = by_class;
  return result;
}

double MlpStep::Work::flops() const {
  double sum = 0.0;
  for (const StepLayer& layer : layers) sum += 6.0 * static_cast<double>(rows * layer.in * layer.out);
  return sum;
}

// Returns the loss; fills dz and inputs of every layer.
double MlpStep::Work::forward_and_backward(const float* x, const StepLoss& step_loss) {
  const int64_t panels = panels_of(rows), count = static_cast<int64_t>(layers.size());
  const int64_t floats = (step_scratch(layers.data(), count) + 15) / 16 * 16;
  const int threads = flops() < kFlopsWorthThreads ? 1 : at::get_num_threads();
  float* memory = scratch.at_least(floats * threads);
  const auto run = [&](int64_t begin, int64_t end) {
    float* mine = memory + floats * (threads == 1 ? 0 : at::get_thread_num());
    for (int64_t panel = begin; panel < end; ++panel)
      kernels.panel({dtype, layers.data(), count, rows, panel, x, step_loss, mine, &values[panel]});
  };
  if (threads == 1)
    run(0, panels);
  else
    at::parallel_for(0, panels, 1, run);
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum * loss_scale;
}

// Fills the gradients of all parameters; returns their norm.
double MlpStep::Work::gradient_norm() {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.gradient(pieces[i]);
  };
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (flops() < kFlopsWorthThreads)
    run(0, count);
  else
    at::parallel_for(0, count, 1, run);
  double sum = 0.0;
  for (const double square : squares) sum += square;
  sum += slope_gradients();
  if (sum > kSmallestSquares && sum < kLargestSquares) return std::sqrt(sum);
  sum = 0.0;
  for (const Parameter& parameter : parameters)
    for (int64_t i = 0; i < parameter.value.numel(); ++i)
      sum += static_cast<double>(parameter.gradient[i]) * parameter.gradient[i];
  return std::sqrt(sum);
}

// Fills the gradients of prelu's slopes; returns the sum of their squares.
double MlpStep::Work::slope_gradients() {
  double squares_of = 0.0;
  for (size_t i = 0, next = 0; i < layers.size(); ++i) {
    next += 1 + tensors[i].bias.has_value();
    if (!tensors[i].slope) continue;
    float* gradient = parameters[next++].gradient;
    const int64_t slopes = tensors[i].slope->numel();
    std::vector<double> sums(slopes);
    for (int64_t at = 0; at < panels_of(rows) * layers[i].out; ++at)
      sums[slopes > 1 ? at % slopes : 0] += layers[i].dslope[at];
    for (int64_t at = 0; at < slopes; ++at) {
      gradient[at] = static_cast<float>(sums[at]);
      squares_of += sums[at] * sums[at];
    }
  }
  return squares_of;
}

// Whether parameters and state allow an update that cannot overflow.
bool MlpStep::Work::bounded() {
  float largest = 0.f;
  bool negative = false;
  for (const Parameter& parameter : parameters) {
    const MlpStepState& state = parameter.state;
    cpu::inspect({data(parameter.value), data_or_null(state.first), data_or_null(state.second), parameter.value.numel(),
                  &largest, &negative});
    if (state.step && !(*data(*state.step) >= 0.f && *data(*state.step) < 16777216.f)) negative = true;
  }
  return largest <= kLargest && !negative;  // NaN is not
}

void MlpStep::Work::update(double scale, const std::vector<MlpStepGroup>& groups) {
  double known = -1.0, rest1 = 1.0, rest2 = 1.0;
  int64_t group = -1;
  const bool corrected = optimizer == Optimizer::adam || optimizer == Optimizer::adamw;
  for (const Parameter& parameter : parameters) {
    const MlpStepState& state = parameter.state;
    const MlpStepGroup& g = groups[state.group];
    const double taken = state.step ? *data(*state.step) += 1.f : 1.0;
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
                                     rounded(1.0 / rest2),
                                     rounded(1.0 - g.lr * g.weight_decay)};
    float *p = data(parameter.value), *first = data_or_null(state.first), *second = data_or_null(state.second);
    const auto run = [&](int64_t begin, int64_t end) {
      cpu::update({settings, rounded(scale), end - begin, p + begin, parameter.gradient + begin,
                   first ? first + begin : nullptr, second ? second + begin : nullptr});
    };
    const int64_t count = parameter.value.numel();
    if (count <= kUpdateGrain)
      run(0, count);
    else
      at::parallel_for(0, count, kUpdateGrain, run);
    // The change is autograd's to know, as that of any in-place operation.
    parameter.value.unsafeGetTensorImpl()->bump_version();
    for (const auto* tensor : {&state.first, &state.second, &state.step})
      if (*tensor) (*tensor)->unsafeGetTensorImpl()->bump_version();
  }
}

MlpStep::MlpStep(std::vector<MlpStepLayer> layers, bool bfloat16, const std::string& activation, double negative_slope,
                 MlpStepLoss loss, const std::string& optimizer, std::vector<MlpStepState> states)
    : work_(std::make_unique<Work>()) {
  TORCH_CHECK_VALUE(!layers.empty() && layers.size() <= kMostLayers, "mlp_step: ", layers.size(),
                    " layers came; it must be 1 to ", kMostLayers);
  work_->tensors = std::move(layers);
  work_->dtype = bfloat16 ? Dtype::bfloat16 : Dtype::float32;
  work_->activation = activation_from_name(activation, "mlp_step");
  work_->negative_slope = static_cast<float>(negative_slope);
  work_->loss = std::move(loss);
  work_->optimizer = optimizer_of(optimizer);
  for (const MlpStepLayer& layer : work_->tensors)
    for (const auto& value : {std::optional(layer.weight), layer.bias, layer.slope})
      if (value) {
        const size_t i = work_->parameters.size();
        TORCH_CHECK_VALUE(i < states.size(), "mlp_step: ", states.size(), " states came for more parameters");
        work_->parameters.push_back({*value, states[i], nullptr});
      }
  work_->lay_out();
}

MlpStep::~MlpStep() = default;

MlpStepOutcome MlpStep::take(const at::Tensor& x, const at::Tensor& target, const std::vector<double>& p,
                             double clip_norm, const std::vector<MlpStepGroup>& groups) {
  Work& work = *work_;
  TORCH_CHECK_VALUE(p.size() + 1 == work.layers.size(), "mlp_step: p has ", p.size(), " entries; it must have ",
                    work.layers.size() - 1);
  const at::Tensor inputs = x.contiguous(), targets = target.contiguous();
  Seed seed(std::any_of(p.begin(), p.end(), [](double each) { return each > 0; }));
  work.set_weights();
  work.set_rows(inputs.size(0), p, seed);
  const std::optional<StepLoss> loss = work.loss_of(targets);
  if (!loss) return {false, 0.0, 0.0};
  const double value = work.forward_and_backward(inputs.const_data_ptr<float>(), *loss);
  if (!std::isfinite(value)) return {false, value, 0.0};
  const double norm = work.gradient_norm(), applied = clip_norm > 0 ? std::min(norm, clip_norm) : norm;
  // Written so that NaN is refused.
  if (!(applied <= kLargest) || !std::isfinite(norm) || !work.bounded()) return {false, value, norm};
  work.update(norm > applied ? applied / norm : 1.0, groups);
  seed.kept = true;
  return {true, value, norm};
}

}  // namespace mlpkit
