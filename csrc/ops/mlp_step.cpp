// A whole training step of an MLP in one call (ops): what is made of torch's tensors, and the decision.
#include "ops/mlp_step.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/DistributionsHelper.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cpu/update.h"
#include "ops/linear_act_dropout.h"
#include "ops/mlp_step_work.h"

namespace mlpkit {
namespace {

// Parameters, state and gradients within this bound, and settings as mlpkit.guard.bounds asks for, cannot overflow in
// an update.
constexpr double kLargest = 1099511627776.0;  // 2^40

// A seed from torch's generator for the CPU, which is put back unless the step keeps what it drew.
class Seed {
 public:
  explicit Seed(bool draws) {
    if (!draws) return;
    generator_ = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    before_ = cpu().engine();
    // As torch.randint(-2^63, 2^63 - 1) draws, so that the general way has the same masks; without its dispatch, which
    // takes longer than the masks of a small network.
    const at::uniform_int_from_to_distribution<int64_t> draw(UINT64_MAX, INT64_MIN);
    seed = draw(&cpu());
    offset = draw(&cpu());
    after_ = cpu().engine();
  }
  ~Seed() {
    if (!after_ || kept) return;
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    // What another thread has drawn meanwhile must not come again.
    if (same(cpu().engine().data(), after_->data())) cpu().set_engine(*before_);
  }
  Seed(const Seed&) = delete;
  Seed& operator=(const Seed&) = delete;
  int64_t seed = 0, offset = 0;
  bool kept = false;

 private:
  at::CPUGeneratorImpl& cpu() { return *at::check_generator<at::CPUGeneratorImpl>(generator_); }
  static bool same(const at::mt19937_data_pod& a, const at::mt19937_data_pod& b) {
    return a.seed_ == b.seed_ && a.left_ == b.left_ && a.next_ == b.next_ && a.state_ == b.state_;
  }
  at::Generator generator_;
  std::optional<at::mt19937> before_, after_;
};

}  // namespace

MlpStepKernels mlp_step_kernels(Dtype dtype) {
#if defined(__x86_64__)
  if (dtype == Dtype::bfloat16 && cpu::capability() == cpu::Capability::avx512_bf16)
    return {2, isa_avx512_bf16::step_weights_of_pairs, isa_avx512_bf16::step_panel_of_pairs,
            isa_avx512_bf16::step_gradient_of_pairs};
#endif
  return {1, dtype == Dtype::float32 ? nullptr : cpu::step_weights, cpu::step_panel, cpu::step_gradient};
}

Dtype dtype_of_precision(const std::string& name) {
  if (name == "bf16") return Dtype::bfloat16;
  if (name == "fp16") return Dtype::float16;
  TORCH_CHECK_VALUE(name == "fp32", "mlp_step: precision is '", name, "'; it must be fp32, bf16 or fp16");
  return Dtype::float32;
}

Optimizer optimizer_from_name(const std::string& name) {
  if (name == "adam") return Optimizer::adam;
  if (name == "adamw") return Optimizer::adamw;
  if (name == "rmsprop") return Optimizer::rmsprop;
  TORCH_CHECK_VALUE(name == "sgd", "mlp_step: optimizer is '", name, "'; it must be sgd, adam, adamw or rmsprop");
  return Optimizer::sgd;
}

// Layers as the kernels take them, with gradients in one block of memory; what depends on the batch comes later.
void MlpStep::Work::lay_out() {
  int64_t floats = 0;
  for (const MlpStepParameter& parameter : parameters) floats += parameter.value->numel();
  float* free = gradients.at_least(floats);
  size_t next = 0;
  const auto gradient = [&] {
    MlpStepParameter& parameter = parameters[next++];
    parameter.gradient = free;
    free += parameter.value->numel();
    return parameter.gradient;
  };
  for (const MlpStepLayer& tensor : tensors) {
    StepLayer layer{};
    layer.in = tensor.weight->size(1);
    layer.out = tensor.weight->size(0);
    const bool last = layers.size() + 1 == tensors.size();
    layer.activation = last ? Activation::identity : activation;
    layer.negative_slope = negative_slope;
    layer.slope_by_column = tensor.slope && tensor.slope->numel() > 1;
    layer.dweight = gradient();
    if (tensor.bias) layer.dbias = gradient();
    NormWork& norm = norms.emplace_back();
    if (tensor.norm.weight) norm.dweight = gradient();
    if (tensor.norm.bias) norm.dbias = gradient();
    dslopes.push_back(tensor.slope ? gradient() : nullptr);
    layers.push_back(layer);
  }
}

// Where the parameters lie now, and the weights as they are multiplied.
void MlpStep::Work::set_weights() {
  kernels = mlp_step_kernels(dtype);
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

void MlpStep::Work::set_dropout(const std::vector<double>& p, int64_t seed, int64_t offset) {
  for (size_t i = 0; i < layers.size(); ++i) {
    Dropout& dropout = layers[i].dropout;
    dropout = {static_cast<uint64_t>(seed), static_cast<uint32_t>(offset), static_cast<uint32_t>(i)};
    dropout.threshold = i + 1 < layers.size() ? dropout_threshold(p[i]) : 0;
    dropout.scale = dropout_scale(dropout.threshold);
  }
}

// Everything that depends on the number of rows, which is mostly that of the step before.
void MlpStep::Work::set_rows(int64_t count) {
  if (count == rows && kernels.per_lane == rows_per_lane) return;
  rows = 0;  // nothing is laid out, should there be no memory
  const int64_t panels = panels_of(count), column = kPanel / kernels.per_lane;
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
      pieces.push_back({&layer, count, i, piece});
    }
  }
  rows = count;
  rows_per_lane = kernels.per_lane;
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
    classes[row] = counts ? static_cast<int32_t>(wanted[row]) : row < rows ? kIgnored : kNoRow;
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

// Whether parameters and state allow an update that cannot overflow.
bool MlpStep::Work::bounded() {
  float largest = 0.f;
  bool negative = false;
  for (const MlpStepParameter& parameter : parameters) {
    const MlpStepState& state = parameter.state;
    cpu::inspect({data(parameter.value), data_or_null(state.first), data_or_null(state.second),
                  parameter.value->numel(), &largest, &negative});
    if (state.step && !(*data(state.step) >= 0.f && *data(state.step) < 16777216.f)) negative = true;
  }
  return largest <= kLargest && !negative;  // NaN is not
}

MlpStep::MlpStep(std::vector<MlpStepLayer> layers, const std::string& precision, const std::string& activation,
                 double negative_slope, MlpStepLoss loss, const std::string& optimizer,
                 std::vector<MlpStepState> states)
    : work_(std::make_unique<Work>()) {
  TORCH_CHECK_VALUE(!layers.empty() && layers.size() <= kMostLayers, "mlp_step: ", layers.size(),
                    " layers came; it must be 1 to ", kMostLayers);
  work_->tensors = std::move(layers);
  work_->dtype = dtype_of_precision(precision);
  work_->activation = activation_from_name(activation, "mlp_step");
  work_->negative_slope = static_cast<float>(negative_slope);
  work_->loss = loss;
  work_->optimizer = optimizer_from_name(optimizer);
  for (const MlpStepLayer& layer : work_->tensors)
    for (const BorrowedTensor value : {layer.weight, layer.bias, layer.norm.weight, layer.norm.bias, layer.slope})
      if (value) {
        const size_t i = work_->parameters.size();
        TORCH_CHECK_VALUE(i < states.size(), "mlp_step: ", states.size(), " states came for more parameters");
        work_->parameters.push_back({value, states[i], nullptr});
      }
  work_->lay_out();
}

MlpStep::~MlpStep() = default;

MlpStepOutcome MlpStep::take(const at::Tensor& x, const at::Tensor& target, const std::vector<double>& p, bool draws,
                             double clip_norm, double scale, const std::vector<MlpStepGroup>& groups) {
  Work& work = *work_;
  TORCH_CHECK_VALUE(p.size() + 1 == work.layers.size(), "mlp_step: p has ", p.size(), " entries; it must have ",
                    work.layers.size() - 1);
  const at::Tensor inputs = x.contiguous(), targets = target.contiguous();
  Seed seed(draws);
  work.set_weights();
  work.set_dropout(p, seed.seed, seed.offset);
  work.set_rows(inputs.size(0));
  work.set_norms();
  std::optional<StepLoss> loss = work.loss_of(targets);
  if (!loss) return {false, 0.0, 0.0};
  loss->scale = static_cast<float>(work.loss_scale * scale);
  const double value = work.forward_and_backward(inputs.const_data_ptr<float>(), *loss);
  // Beyond float32, the general way's loss is Inf.
  if (!(std::abs(value) <= FLT_MAX)) return {false, value, 0.0};
  const double norm = work.gradient_norm() / scale, applied = clip_norm > 0 ? std::min(norm, clip_norm) : norm;
  // Written so that NaN is refused.
  if (!(applied <= kLargest) || !std::isfinite(norm) || !work.bounded() || !work.averages_bounded())
    return {false, value, norm};
  const double factor = (norm > applied ? applied / norm : 1.0) / scale;
  // A float would have few bits left of it, or none.
  if (factor < 0x1p-126) return {false, value, norm};
  work.update(factor, groups);
  work.move_averages();
  seed.kept = true;
  return {true, value, norm};
}

}  // namespace mlpkit
