// Small networks on a CUDA device (ops): their outputs in one launch, a whole training step in three.
//
// All work goes to the current stream of x's device; nothing waits for it, and what moves from step to step (seed, step
// counts, loss scale) stays on the device, so a call can be captured in a CUDA graph. A step that a graph repeats must
// have its scratch memory from the graph's own pool, as torch gives it while it captures.
#include "cuda/mlp_step.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/linear_act_dropout.h"
#include "ops/mlp_step.h"

namespace mlpkit {
namespace {

using Tensors = at::TensorList;

// The device that a tensor is on, made current, with what plans ask of it.
class SmallCall {
 public:
  explicit SmallCall(const at::Tensor& x) : guard_(x.device()) {
    int major = 0, minor = 0;
    read(cudaDevAttrComputeCapabilityMajor, major);
    read(cudaDevAttrComputeCapabilityMinor, minor);
    const int capability = 10 * major + minor;
    TORCH_CHECK_NOT_IMPLEMENTED(capability >= 80 && capability >= MLPKIT_CUDA_MINIMUM, "mlp_step: ", x.device(),
                                " has compute capability ", major, ".", minor,
                                "; whole small networks need 8.0, and a build of mlpkit that includes the device");
    read(cudaDevAttrMultiProcessorCount, device.multiprocessors);
    read(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes);
  }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

  cuda::MlpDevice device{};

 private:
  void read(cudaDeviceAttr attribute, int& to) const {
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&to, attribute, guard_.current_device().index()));
  }
  c10::cuda::CUDAGuard guard_;
  at::AutoDispatchBelowADInplaceOrView below_;
};

void check_tensor(const at::Tensor& tensor, c10::ScalarType dtype, const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.device() == x.device(),
                    "mlp_step: ", name, " is ", tensor.scalar_type(), " on ", tensor.device(),
                    tensor.is_contiguous() ? "" : ", not contiguous", "; it must be contiguous ", dtype, " on ",
                    x.device());
}

// A network as the kernels take it; parameters: weight and bias of the first layer and so on, where `biases` says.
struct Described {
  cuda::MlpPass pass{};
  cuda::MlpShape shape{};
  cuda::MlpPlan plan{};
  std::vector<int> weight_of, bias_of;

  Described(const at::Tensor& x, Tensors parameters, c10::List<bool> biases, std::string_view activation,
            double negative_slope, at::ArrayRef<double> p, bool half) {
    const int layers = static_cast<int>(biases.size());
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0 && x.is_contiguous(), "mlp_step: x has shape ", x.sizes(),
                      "; it must be contiguous rows, at least one");
    TORCH_CHECK_VALUE(layers >= 1 && layers <= cuda::kMlpLayers, "mlp_step: ", layers, " layers came; it must be 1 to ",
                      cuda::kMlpLayers);
    TORCH_CHECK_VALUE(static_cast<int>(p.size()) + 1 == layers, "mlp_step: p has ", p.size(), " entries; it must have ",
                      layers - 1);
    pass.dtype = half ? Dtype::float16 : Dtype::bfloat16;
    pass.activation = activation_from_name(activation, "mlp_step");
    TORCH_CHECK_VALUE(pass.activation != Activation::prelu,
                      "mlp_step: activation is prelu, whose slope is a parameter");
    pass.negative_slope = static_cast<float>(negative_slope);
    pass.layers = shape.layers = layers;
    pass.rows = shape.rows = x.size(0);
    pass.x = x.const_data_ptr();
    pass.x_is_single = x.scalar_type() == at::kFloat;
    TORCH_CHECK_VALUE(pass.x_is_single || x.scalar_type() == (half ? at::kHalf : at::kBFloat16), "mlp_step: x is ",
                      x.scalar_type(), "; it must be float32 or of the products' dtype");
    int64_t width = x.size(1);
    shape.widths[0] = static_cast<int>(std::min<int64_t>(width, INT_MAX));
    size_t next = 0;
    const auto take = [&]() -> const at::Tensor& {
      TORCH_CHECK_VALUE(next < parameters.size(), "mlp_step: ", parameters.size(), " parameters came for more layers");
      check_tensor(parameters[next], at::kFloat, x, "a parameter");
      return parameters[next++];
    };
    bool drops = false;
    for (int i = 0; i < layers; ++i) {
      cuda::MlpLayer& layer = pass.layer[i];
      weight_of.push_back(static_cast<int>(next));
      const at::Tensor& weight = take();
      TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == width, "mlp_step: weight ", i, " has shape ",
                        weight.sizes(), "; it must have ", width, " columns");
      layer.weight = weight.const_data_ptr<float>();
      width = weight.size(0);
      bias_of.push_back(biases[i] ? static_cast<int>(next) : -1);
      if (biases[i]) {
        const at::Tensor& bias = take();
        TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == width, "mlp_step: bias ", i, " has shape ", bias.sizes(),
                          "; it must be [", width, "]");
        layer.bias = bias.const_data_ptr<float>();
      }
      layer.in = shape.widths[i];
      layer.out = shape.widths[i + 1] = static_cast<int>(std::min<int64_t>(width, INT_MAX));
      layer.threshold = i + 1 < layers ? dropout_threshold(p[i]) : 0;
      layer.scale = static_cast<float>(dropout_scale(layer.threshold));
      drops = drops || layer.threshold > 0;
    }
    const bool linear = pass.activation == Activation::identity && !drops;
    shape.keeps_slopes = !(pass.activation == Activation::relu || linear);
  }

  void make_plan(const SmallCall& call) {
    const char* obstacle = cuda::mlp_obstacle(shape);
    TORCH_CHECK_VALUE(!obstacle, "mlp_step: the network is not a small one: ", obstacle);
    TORCH_CHECK_VALUE(cuda::plan_mlp(shape, call.device, plan), "mlp_step: the network needs more than the ",
                      call.device.shared_bytes, " bytes of shared memory that a block of this device has");
  }

  void set_seed(const std::optional<at::Tensor>& seed, const at::Tensor& x) {
    bool draws = false;
    for (int i = 0; i < pass.layers; ++i)
      draws = draws || (pass.layer[i].threshold > 0 && pass.layer[i].threshold < 65536);
    TORCH_CHECK_VALUE(!draws || seed.has_value(), "mlp_step: p is above 0, so a seed must be given");
    if (!seed) return;
    check_tensor(*seed, at::kLong, x, "seed");
    TORCH_CHECK_VALUE(seed->numel() == 2, "mlp_step: seed has ", seed->numel(),
                      " entries; it must have (seed, offset)");
    pass.seed = seed->const_data_ptr<int64_t>();
  }
};

at::Tensor forward(const at::Tensor& x, Tensors parameters, c10::List<bool> biases,
                   const std::optional<at::Tensor>& seed, std::string_view activation, double negative_slope,
                   at::ArrayRef<double> p, bool half) {
  const SmallCall call(x);
  Described network(x, parameters, biases, activation, negative_slope, p, half);
  network.set_seed(seed, x);
  network.make_plan(call);
  const int64_t outputs = network.shape.widths[network.shape.layers];
  at::Tensor y = at::empty({network.shape.rows, outputs}, x.options().dtype(half ? at::kHalf : at::kBFloat16));
  network.pass.y = y.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::mlp_pass(network.pass, network.plan, call.stream()));
  return y;
}

void set_loss(Described& network, const at::Tensor& x, const at::Tensor& target, int64_t kind, bool mean, double delta,
              double label_smoothing, int64_t ignore_index, const std::optional<at::Tensor>& class_weights) {
  cuda::MlpLoss& loss = network.pass.loss;
  const int64_t rows = network.shape.rows, outputs = network.shape.widths[network.shape.layers];
  const bool classes = kind == static_cast<int64_t>(Loss::cross_entropy);
  check_tensor(target, classes ? at::kLong : at::kFloat, x, "target");
  TORCH_CHECK_VALUE(target.numel() == (classes ? rows : rows * outputs), "mlp_step: target has shape ", target.sizes(),
                    "; it must fit ", rows, " rows of ", outputs, " outputs");
  if (class_weights) {
    check_tensor(*class_weights, at::kFloat, x, "class_weights");
    TORCH_CHECK_VALUE(class_weights->numel() == outputs, "mlp_step: class_weights has ", class_weights->numel(),
                      " entries; it must have ", outputs);
    loss.by_class = class_weights->const_data_ptr<float>();
  }
  loss.kind = static_cast<Loss>(kind);
  loss.mean = mean;
  const double terms = static_cast<double>(classes ? rows : rows * outputs);
  loss.slope_scale = static_cast<float>(mean ? 1.0 / terms : 1.0);
  loss.delta = static_cast<float>(delta);
  loss.certain = static_cast<float>(1.0 - label_smoothing);
  loss.spread = static_cast<float>(label_smoothing / static_cast<double>(outputs));
  loss.ignore_index = ignore_index;
  if (classes)
    loss.classes = target.const_data_ptr<int64_t>();
  else
    loss.target = target.const_data_ptr<float>();
  network.pass.has_loss = network.shape.loss = network.shape.gradients = true;
}

float* state_of(Tensors tensors, Tensors parameters, size_t i, const at::Tensor& x, bool single) {
  if (tensors.empty()) return nullptr;
  TORCH_CHECK_VALUE(tensors.size() == parameters.size(), "mlp_step: ", tensors.size(), " tensors of state came for ",
                    parameters.size(), " parameters");
  check_tensor(tensors[i], at::kFloat, x, "a tensor of state");
  TORCH_CHECK_VALUE(tensors[i].numel() == (single ? 1 : parameters[i].numel()),
                    "mlp_step: a tensor of state has shape ", tensors[i].sizes(), ", which is not its parameter's");
  return tensors[i].mutable_data_ptr<float>();
}

// groups: lr, weight decay, momentum, dampening, beta1, beta2, eps, nesterov of each; rates: none, or of each group its
// learning rate in a float32 tensor. scale: none, or the loss scale (float32) and the number of clean steps (int32);
// rule: growth, backoff, floor, ceiling, interval of the scale.
void set_groups(cuda::MlpUpdate& update, at::ArrayRef<double> groups, Tensors rates, const at::Tensor& x) {
  constexpr size_t numbers = 8;
  TORCH_CHECK_VALUE(groups.size() % numbers == 0 && groups.size() / numbers <= cuda::kMlpGroups,
                    "mlp_step: groups has ", groups.size(), " entries; it must have 8 for each of at most ",
                    cuda::kMlpGroups, " groups");
  update.groups = static_cast<int>(groups.size() / numbers);
  TORCH_CHECK_VALUE(rates.empty() || rates.size() == groups.size() / numbers, "mlp_step: ", rates.size(),
                    " rates came for ", update.groups, " groups");
  for (int i = 0; i < update.groups; ++i) {
    const double* g = groups.data() + numbers * i;
    if (!rates.empty()) check_tensor(rates[i], at::kFloat, x, "a learning rate");
    update.group[i] = {g[1],      g[2], g[3],
                       g[4],      g[5], g[6],
                       g[7] != 0, g[0], rates.empty() ? nullptr : rates[i].const_data_ptr<float>()};
  }
}

std::tuple<at::Tensor, at::Tensor> step(const at::Tensor& x, const at::Tensor& target, Tensors parameters,
                                        c10::List<bool> biases, Tensors first, Tensors second, Tensors steps,
                                        const at::Tensor& seed, Tensors scale, std::string_view activation,
                                        double negative_slope, at::ArrayRef<double> p, bool half, int64_t loss,
                                        bool mean, double delta, double label_smoothing, int64_t ignore_index,
                                        const std::optional<at::Tensor>& class_weights, std::string_view optimizer,
                                        at::ArrayRef<double> groups, at::IntArrayRef group_of, Tensors rates,
                                        double clip_norm, at::ArrayRef<double> rule) {
  const SmallCall call(x);
  Described network(x, parameters, biases, activation, negative_slope, p, half);
  network.set_seed(seed, x);
  set_loss(network, x, target, loss, mean, delta, label_smoothing, ignore_index, class_weights);
  network.make_plan(call);

  cuda::MlpUpdate update{};
  update.optimizer = optimizer_from_name(std::string(optimizer));
  set_groups(update, groups, rates, x);
  TORCH_CHECK_VALUE(group_of.size() == parameters.size(), "mlp_step: group_of has ", group_of.size(),
                    " entries; it must have one for each of ", parameters.size(), " parameters");
  int64_t floats = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    TORCH_CHECK_VALUE(group_of[i] >= 0 && group_of[i] < update.groups, "mlp_step: group ", group_of[i], " is none of ",
                      update.groups);
    update.parameter[i] = {parameters[i].mutable_data_ptr<float>(),
                           state_of(first, parameters, i, x, false),
                           state_of(second, parameters, i, x, false),
                           state_of(steps, parameters, i, x, true),
                           floats,
                           static_cast<int>(parameters[i].numel()),
                           static_cast<int>(group_of[i])};
    floats += (parameters[i].numel() + 3) / 4 * 4;
  }
  const int64_t blocks = network.plan.blocks, reducing = cuda::reduce_blocks(network.plan.floats);
  constexpr int64_t values = sizeof(cuda::MlpValues) / 8, control = (sizeof(cuda::MlpControl) + 7) / 8;
  const at::Tensor parts = at::empty({blocks, network.plan.floats}, x.options().dtype(at::kFloat));
  const at::Tensor doubles = at::empty({blocks * values + reducing}, x.options().dtype(at::kDouble));
  const at::Tensor bad = at::empty({reducing}, x.options().dtype(at::kInt));
  at::Tensor gradients = at::empty({floats}, x.options().dtype(at::kFloat));
  at::Tensor outcome = at::empty({control}, x.options().dtype(at::kDouble));

  cuda::MlpPass& pass = network.pass;
  pass.parts = parts.mutable_data_ptr<float>();
  pass.values = reinterpret_cast<cuda::MlpValues*>(doubles.mutable_data_ptr<double>());
  if (!scale.empty()) {
    TORCH_CHECK_VALUE(scale.size() == 2 && rule.size() == 5,
                      "mlp_step: a loss scale is (scale, clean steps) and five "
                      "numbers of its rule");
    check_tensor(scale[0], at::kFloat, x, "the loss scale");
    check_tensor(scale[1], at::kInt, x, "the number of clean steps");
    pass.loss_scale = update.loss_scale = scale[0].mutable_data_ptr<float>();
    update.clean_steps = reinterpret_cast<uint32_t*>(scale[1].mutable_data_ptr<int32_t>());
    const auto number = [&](size_t i) { return static_cast<float>(rule[i]); };
    update.growth = number(0), update.backoff = number(1), update.floor = number(2), update.ceiling = number(3);
    update.growth_interval = static_cast<int>(rule[4]);
  }
  update.layers = pass.layers;
  for (int i = 0; i < pass.layers; ++i) {
    update.layer[i] = pass.layer[i];
    update.dweight[i] = network.plan.dweight[i];
    update.dbias[i] = network.plan.dbias[i];
    update.weight_of[i] = network.weight_of[i];
    update.bias_of[i] = network.bias_of[i];
  }
  update.parts = network.plan.blocks;
  update.parameters = static_cast<int>(parameters.size());
  update.floats = network.plan.floats;
  update.quads = floats / 4;
  update.rows = network.shape.rows;
  update.outputs = network.shape.widths[network.shape.layers];
  update.mean = mean;
  update.by_counted = mean && pass.loss.kind == Loss::cross_entropy;
  update.part = pass.parts;
  update.values = pass.values;
  update.clip_norm = clip_norm;
  update.gradients = gradients.mutable_data_ptr<float>();
  update.squares = doubles.mutable_data_ptr<double>() + blocks * values;
  update.bad = reinterpret_cast<uint32_t*>(bad.mutable_data_ptr<int32_t>());
  update.control = reinterpret_cast<cuda::MlpControl*>(outcome.mutable_data_ptr<double>());
  update.seed = seed.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(cuda::mlp_pass(pass, network.plan, call.stream()));
  C10_CUDA_CHECK(cuda::mlp_update(update, call.stream()));
  return {outcome.narrow(0, 0, 5), gradients};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  m.def(
      "mlp_step_forward(Tensor x, Tensor[] parameters, bool[] biases, Tensor? seed, str activation, float "
      "negative_slope, float[] p, bool half) -> Tensor");
  m.def(
      "mlp_step(Tensor x, Tensor target, Tensor(a!)[] parameters, bool[] biases, Tensor(b!)[] first, Tensor(c!)[] "
      "second, Tensor(d!)[] steps, Tensor(e!) seed, Tensor(f!)[] scale, str activation, float negative_slope, float[] "
      "p, bool half, int loss, bool mean, float delta, float label_smoothing, int ignore_index, Tensor? class_weights, "
      "str optimizer, float[] groups, int[] group_of, Tensor[] rates, float clip_norm, float[] rule) -> (Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) {
  m.impl("mlp_step_forward", forward);
  m.impl("mlp_step", step);
}

}  // namespace mlpkit
