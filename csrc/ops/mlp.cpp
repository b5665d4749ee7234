// mlp: a whole network of linear_act_dropout layers as one autograd node each way (ops). It works on any device that
// has the layer's two halves, and traces into them.
#include "ops/mlp.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/linear_act_dropout.h"
#include "ops/linear_act_dropout_wide.h"

namespace mlpkit {
namespace {

// Everything but the tensors that have gradients.
struct Plan {
  std::string activation;
  double negative_slope;
  std::vector<double> p;  // for each hidden layer
  std::vector<bool> has_bias, has_slope;
  OptionalTensor seed;

  size_t layers() const { return has_bias.size(); }
  bool hidden(size_t layer) const { return layer + 1 < layers(); }
  // The last layer is linear.
  const char* activation_of(size_t layer) const { return hidden(layer) ? activation.c_str() : "identity"; }
  double p_of(size_t layer) const { return hidden(layer) ? p[layer] : 0.0; }
};

struct Layer {
  at::Tensor weight;
  OptionalTensor bias, slope;
};

// x and the layers' tensors in one list, absent ones left out, as autograd wants them.
struct Flat {
  std::vector<at::Tensor> tensors;
  std::vector<Layer> layers(const Plan& plan) const {
    std::vector<Layer> result;
    size_t next = 1;
    for (size_t i = 0; i < plan.layers(); ++i) {
      Layer layer{tensors[next++], std::nullopt, std::nullopt};
      if (plan.has_bias[i]) layer.bias = tensors[next++];
      if (plan.has_slope[i]) layer.slope = tensors[next++];
      result.push_back(std::move(layer));
    }
    return result;
  }
};

struct Saved {
  at::Tensor input, z, bits;
};

at::Tensor run(const at::Tensor& x, const std::vector<Layer>& layers, const Plan& plan, std::vector<Saved>* saved) {
  at::Tensor y = x;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    auto [next, z, bits] = linear_act_dropout_forward(
        y, layer.weight, layer.bias, layer.slope, plan.p_of(i) > 0 ? plan.seed : std::nullopt, plan.activation_of(i),
        plan.negative_slope, plan.p_of(i), static_cast<int64_t>(i), saved != nullptr);
    if (saved) saved->push_back({y, z, bits});
    y = next;
  }
  return y;
}

template <class To, class From>
std::vector<To> list_of(const From& from) {
  return std::vector<To>(from.begin(), from.end());
}

// On its way down a network: the gradient by a layer's y, or already by its z, and then its bias gradient with it.
struct Gradient {
  at::Tensor tensor, dbias;
  bool by_z;
};

SavedLayer saved_layer(const Plan& plan, const torch::autograd::variable_list& saved, size_t i) {
  const at::Tensor* kept = &saved[5 * i];
  return {kept[1], kept[3], kept[4], plan.activation_of(i), plan.negative_slope, plan.p_of(i)};
}

// One layer's gradients; what goes down is the gradient by the z of the layer below where one kernel leads there.
std::tuple<Gradient, at::Tensor, at::Tensor, at::Tensor> layer_backward(const Plan& plan,
                                                                        const torch::autograd::variable_list& saved,
                                                                        size_t i, Gradient dy,
                                                                        std::array<bool, 4> needs) {
  const at::Tensor* kept = &saved[5 * i];
  const bool leads = i > 0 && needs[0] && wide_kernels_lead(dy.tensor, kept[1], saved_layer(plan, saved, i - 1));
  if (!leads && !dy.by_z) {
    auto [dx, dweight, dbias, dslope] =
        linear_act_dropout_backward(dy.tensor, kept[0], kept[1], optional(kept[2]), kept[3], kept[4],
                                    plan.activation_of(i), plan.negative_slope, plan.p_of(i), needs);
    return {{dx, {}, false}, dweight, dbias, dslope};
  }
  if (!dy.by_z && plan.hidden(i)) {
    auto [dz, dbias] = gradient_by_z(dy.tensor, saved_layer(plan, saved, i));
    dy = {dz, dbias, true};
  }
  // A linear layer's z is its y. Only layers without slopes come here.
  const at::Tensor none = at::empty({0}, kept[0].options()),
                   no_bits = at::empty({0}, kept[0].options().dtype(at::kByte));
  auto [dx, dweight, dbias, dslope] =
      linear_act_dropout_backward(dy.tensor, kept[0], kept[1], std::nullopt, none, no_bits, "identity", 0.0, 0.0,
                                  {needs[0] && !leads, needs[1], needs[2] && !dy.by_z, false});
  if (dy.by_z) dbias = dy.dbias;
  if (!leads) return {{dx, {}, false}, dweight, dbias, dslope};
  auto [dz, next_dbias] = wide_gradient(dy.tensor, kept[1], saved_layer(plan, saved, i - 1));
  return {{dz, next_dbias, true}, dweight, dbias, dslope};
}

struct Node : torch::autograd::Function<Node> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList tensors, const Plan& plan) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const std::vector<Layer> layers = Flat{tensors.vec()}.layers(plan);
    std::vector<Saved> saved;
    at::Tensor y = run(tensors[0], layers, plan, &saved);
    std::vector<at::Tensor> keep;
    for (size_t i = 0; i < layers.size(); ++i)
      for (const at::Tensor& tensor :
           {saved[i].input, layers[i].weight, undefined_if_absent(layers[i].slope), saved[i].z, saved[i].bits})
        keep.push_back(tensor);
    ctx->save_for_backward(keep);
    ctx->saved_data["activation"] = plan.activation;
    ctx->saved_data["negative_slope"] = plan.negative_slope;
    ctx->saved_data["p"] = plan.p;
    ctx->saved_data["has_bias"] = list_of<int64_t>(plan.has_bias);
    ctx->saved_data["has_slope"] = list_of<int64_t>(plan.has_slope);
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Plan plan{ctx->saved_data["activation"].toStringRef(),
                    ctx->saved_data["negative_slope"].toDouble(),
                    ctx->saved_data["p"].toDoubleVector(),
                    list_of<bool>(ctx->saved_data["has_bias"].toIntVector()),
                    list_of<bool>(ctx->saved_data["has_slope"].toIntVector()),
                    std::nullopt};
    size_t edges = 1 + plan.layers();
    for (size_t i = 0; i < plan.layers(); ++i) edges += plan.has_bias[i] + plan.has_slope[i];
    torch::autograd::variable_list result(edges + 1);  // one more for the plan
    size_t lowest = 0;  // the first tensor that wants a gradient: nothing below it is computed
    while (lowest < edges && !ctx->needs_input_grad(lowest)) ++lowest;

    Gradient dy{grads[0], {}, false};
    size_t end = edges;
    for (size_t i = plan.layers(); i-- > 0 && end > lowest;) {
      const size_t first = end - 1 - plan.has_bias[i] - plan.has_slope[i], bias = first + 1,
                   slope = bias + plan.has_bias[i];
      const std::array<bool, 4> needs = {lowest < first, ctx->needs_input_grad(first),
                                         plan.has_bias[i] && ctx->needs_input_grad(bias),
                                         plan.has_slope[i] && ctx->needs_input_grad(slope)};
      auto [dx, dweight, dbias, dslope] = layer_backward(plan, saved, i, dy, needs);
      if (needs[1]) result[first] = dweight;
      if (needs[2]) result[bias] = dbias;
      if (needs[3]) result[slope] = dslope;
      dy = std::move(dx);
      end = first;
    }
    if (ctx->needs_input_grad(0)) result[0] = dy.tensor;
    return result;
  }
};

void check(at::TensorList weights, const std::vector<OptionalTensor>& biases, const std::vector<OptionalTensor>& slopes,
           at::ArrayRef<double> p) {
  TORCH_CHECK_VALUE(!weights.empty(), "mlp: weights is empty; it must hold one weight for each layer");
  TORCH_CHECK_VALUE(biases.size() == weights.size(), "mlp: biases has ", biases.size(),
                    " entries; it must have one for each of ", weights.size(), " weights");
  TORCH_CHECK_VALUE(slopes.size() == weights.size(), "mlp: slopes has ", slopes.size(),
                    " entries; it must have one for each of ", weights.size(), " weights");
  TORCH_CHECK_VALUE(p.size() + 1 == weights.size(), "mlp: p has ", p.size(), " entries; it must have one for each of ",
                    weights.size() - 1, " hidden layers");
}

// The plan and the flat list of an argument list that fits.
std::pair<Plan, Flat> gather(const at::Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases,
                             const c10::List<OptionalTensor>& slopes, const OptionalTensor& seed,
                             std::string_view activation, double negative_slope, at::ArrayRef<double> p) {
  const auto bias_of = list_of<OptionalTensor>(biases), slope_of = list_of<OptionalTensor>(slopes);
  check(weights, bias_of, slope_of, p);
  Plan plan{std::string(activation), negative_slope, p.vec(), {}, {}, seed};
  Flat flat{{x}};
  for (size_t i = 0; i < weights.size(); ++i) {
    flat.tensors.push_back(weights[i]);
    plan.has_bias.push_back(bias_of[i].has_value());
    plan.has_slope.push_back(slope_of[i].has_value());
    if (bias_of[i]) flat.tensors.push_back(*bias_of[i]);
    if (slope_of[i]) flat.tensors.push_back(*slope_of[i]);
  }
  return {std::move(plan), std::move(flat)};
}

at::Tensor inference(const at::Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases,
                     const c10::List<OptionalTensor>& slopes, const OptionalTensor& seed, std::string_view activation,
                     double negative_slope, at::ArrayRef<double> p) {
  const auto [plan, flat] = gather(x, weights, biases, slopes, seed, activation, negative_slope, p);
  return run(x, flat.layers(plan), plan, nullptr);
}

at::Tensor autograd(const at::Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases,
                    const c10::List<OptionalTensor>& slopes, const OptionalTensor& seed, std::string_view activation,
                    double negative_slope, at::ArrayRef<double> p) {
  const auto [plan, flat] = gather(x, weights, biases, slopes, seed, activation, negative_slope, p);
  bool wanted = false;
  for (const at::Tensor& tensor : flat.tensors) {
    refuse_tangent("mlp", "an argument", tensor);
    wanted = wanted || tensor.requires_grad();
  }
  if (at::GradMode::is_enabled() && wanted) return Node::apply(at::TensorList(flat.tensors), plan);
  at::AutoDispatchBelowADInplaceOrView guard;
  return run(x, flat.layers(plan), plan, nullptr);
}

}  // namespace

at::Tensor mlp(const at::Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases,
               const c10::List<OptionalTensor>& slopes, const OptionalTensor& seed, std::string_view activation,
               double negative_slope, at::ArrayRef<double> p) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mlpkit::mlp", "").typed<decltype(mlp)>();
  return op.call(x, weights, biases, slopes, seed, activation, negative_slope, p);
}

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  m.def(
      "mlp(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] slopes, Tensor? seed, str activation, float "
      "negative_slope, "
      "float[] p) -> Tensor");
}

TORCH_LIBRARY_IMPL(mlpkit, CompositeExplicitAutograd, m) { m.impl("mlp", inference); }
TORCH_LIBRARY_IMPL(mlpkit, Autograd, m) { m.impl("mlp", autograd); }

}  // namespace mlpkit
