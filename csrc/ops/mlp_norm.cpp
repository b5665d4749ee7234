// mlp_norm: a whole network of linear, norm, activation and dropout as one autograd node each way (ops). It works on
// any device that has the halves of linear_act_dropout and norm_act_dropout, and traces into them.
#include "ops/mlp_norm.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/norm_act_dropout.h"

namespace mlpkit {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalList = c10::List<OptionalTensor>;

// The tensors of one layer that may have a gradient, in the order in which autograd knows them.
enum Part { kWeight, kBias, kSlope, kNormWeight, kNormBias, kParts };

struct Layer {
  OptionalTensor parts[kParts];
  OptionalTensor mean, variance;
};

struct Network {
  std::vector<Layer> layers;
  OptionalTensor seed;
  std::string norm, activation;
  double eps, negative_slope;
  std::vector<double> p;  // for each hidden layer

  bool hidden(size_t layer) const { return layer + 1 < layers.size(); }
};

// What the backward pass of a layer reads: the layer's input for dW, z for its norm and activation alike, the few
// numbers of the statistics, and a bit an element. The output is the next layer's input, and so it is kept once.
enum Kept { kInput, kZ, kMean, kInverse, kBits, kKept };
using Saved = std::array<at::Tensor, kKept>;

using Result = std::tuple<at::Tensor, at::Tensor>;

Result run(const at::Tensor& x, const Network& network, std::vector<Saved>* saved) {
  at::Tensor y = x;
  std::vector<at::Tensor> means, variances;
  for (size_t i = 0; i < network.layers.size(); ++i) {
    const auto& parts = network.layers[i].parts;
    const at::Tensor z = std::get<0>(linear_act_dropout_forward(y, *parts[kWeight], parts[kBias], std::nullopt,
                                                                std::nullopt, "identity", 0.0, 0.0, 0, false));
    Saved kept{y, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
    y = z;
    if (network.hidden(i)) {
      auto [next, mean, inverse, variance, bits] = norm_act_dropout_forward(
          z, parts[kNormWeight], parts[kNormBias], network.layers[i].mean, network.layers[i].variance, parts[kSlope],
          network.p[i] > 0 ? network.seed : std::nullopt, network.norm, network.eps, network.activation,
          network.negative_slope, network.p[i], static_cast<int64_t>(i), saved != nullptr);
      if (!network.layers[i].mean && network.norm == "batch") {
        means.push_back(mean);
        variances.push_back(variance);
      }
      kept = {kept[kInput], z, mean, inverse, bits};
      y = next;
    }
    if (saved) saved->push_back(kept);
  }
  if (means.empty()) return {y, at::empty({0}, x.options())};
  return {y, at::stack({at::cat(means), at::cat(variances)})};
}

// One backward pass: which tensors want a gradient, and the gradients found so far.
class Pass {
 public:
  Pass(AutogradContext* ctx)
      : ctx_(*ctx),
        saved_(ctx->get_saved_variables()),
        p_(ctx->saved_data["p"].toDoubleVector()),
        edges_(p_.size() + 1),
        count_(1) {
    // Edges: x, and then the parts that are there, layer by layer.
    for (size_t i = 0; i < edges_.size(); ++i)
      for (size_t part = 0; part < kParts; ++part) edges_[i][part] = parts(i)[part].defined() ? count_++ : 0;
    while (lowest_ < count_ && !ctx->needs_input_grad(lowest_)) ++lowest_;
    result_.resize(count_ + 1);  // one more for the network
  }

  variable_list run(at::Tensor dy) {
    for (size_t i = edges_.size(); i-- > 0 && dy.defined();) {
      if (i < p_.size()) dy = through_norm(i, dy);
      if (dy.defined()) dy = through_linear(i, dy);
    }
    if (ctx_.needs_input_grad(0)) result_[0] = dy;
    return std::move(result_);
  }

 private:
  // Each returns the gradient of what came in, undefined where nobody wants it.
  at::Tensor through_norm(size_t i, const at::Tensor& dy) {
    const bool wants_z = wants_input(i) || wanted(i, kWeight) || wanted(i, kBias);
    auto [dz, dweight, dbias, dslope] = norm_act_dropout_backward(
        dy, kept(i)[kZ], optional(parts(i)[kNormWeight]), optional(parts(i)[kNormBias]), optional(parts(i)[kSlope]),
        kept(i)[kMean], kept(i)[kInverse], kept(i)[kBits], ctx_.saved_data["norm"].toStringRef(),
        ctx_.saved_data["fixed"].toBool(), ctx_.saved_data["activation"].toStringRef(),
        ctx_.saved_data["negative_slope"].toDouble(), p_[i],
        {wants_z, wanted(i, kNormWeight), wanted(i, kNormBias), wanted(i, kSlope)});
    give(i, kNormWeight, dweight);
    give(i, kNormBias, dbias);
    give(i, kSlope, dslope);
    return wants_z ? dz : at::Tensor();
  }
  at::Tensor through_linear(size_t i, const at::Tensor& dy) {
    const at::Tensor none = at::empty({0}, dy.options()), no_bits = at::empty({0}, dy.options().dtype(at::kByte));
    const auto grads =
        linear_act_dropout_backward(dy, kept(i)[kInput], parts(i)[kWeight], std::nullopt, none, no_bits, "identity",
                                    0.0, 0.0, {wants_input(i), wanted(i, kWeight), wanted(i, kBias), false});
    give(i, kWeight, std::get<1>(grads));
    give(i, kBias, std::get<2>(grads));
    return wants_input(i) ? std::get<0>(grads) : at::Tensor();
  }

  const at::Tensor* kept(size_t layer) const { return &saved_[layer * (kKept + kParts)]; }
  const at::Tensor* parts(size_t layer) const { return kept(layer) + kKept; }
  bool wanted(size_t layer, Part part) const {
    return edges_[layer][part] > 0 && ctx_.needs_input_grad(edges_[layer][part]);
  }
  // Below the first tensor that wants a gradient nothing is computed.
  bool wants_input(size_t layer) const { return lowest_ < edges_[layer][kWeight]; }
  void give(size_t layer, Part part, const at::Tensor& grad) {
    if (wanted(layer, part)) result_[edges_[layer][part]] = grad;
  }

  AutogradContext& ctx_;
  variable_list saved_;
  std::vector<double> p_;
  std::vector<std::array<size_t, kParts>> edges_;
  size_t count_, lowest_ = 0;
  variable_list result_;
};

struct Node : torch::autograd::Function<Node> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Network& network) {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<Saved> saved;
    auto [y, statistics] = run(tensors[0], network, &saved);
    std::vector<at::Tensor> keep;
    for (size_t i = 0; i < network.layers.size(); ++i) {
      keep.insert(keep.end(), saved[i].begin(), saved[i].end());
      for (const OptionalTensor& part : network.layers[i].parts) keep.push_back(undefined_if_absent(part));
    }
    ctx->save_for_backward(keep);
    ctx->saved_data["norm"] = network.norm;
    ctx->saved_data["fixed"] = network.layers[0].mean.has_value();
    ctx->saved_data["activation"] = network.activation;
    ctx->saved_data["negative_slope"] = network.negative_slope;
    ctx->saved_data["p"] = network.p;
    ctx->mark_non_differentiable({statistics});
    return {y, statistics};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) { return Pass(ctx).run(grads[0]); }
};

void check_count(const char* name, size_t count, size_t wanted) {
  TORCH_CHECK_VALUE(count == wanted, "mlp_norm: ", name, " has ", count, " entries; it must have ", wanted);
}

Network gather(at::TensorList weights, const OptionalList& biases, const OptionalList& slopes,
               const OptionalList& norm_weights, const OptionalList& norm_biases, const OptionalList& means,
               const OptionalList& variances, const OptionalTensor& seed, std::string_view norm, double eps,
               std::string_view activation, double negative_slope, at::ArrayRef<double> p) {
  TORCH_CHECK_VALUE(weights.size() > 1, "mlp_norm: weights has ", weights.size(),
                    " entries; a network with a norm has a hidden layer");
  check_count("p", p.size(), weights.size() - 1);
  check_count("biases", biases.size(), weights.size());
  Network network{std::vector<Layer>(weights.size()),
                  seed,
                  std::string(norm),
                  std::string(activation),
                  eps,
                  negative_slope,
                  p.vec()};
  const auto take = [&](const char* name, const OptionalList& list, auto&& place) {
    check_count(name, list.size(), p.size());
    for (size_t i = 0; i < p.size(); ++i) place(network.layers[i]) = list.get(i);
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    network.layers[i].parts[kWeight] = weights[i];
    network.layers[i].parts[kBias] = biases.get(i);
  }
  take("slopes", slopes, [](Layer& layer) -> auto& { return layer.parts[kSlope]; });
  take("norm_weights", norm_weights, [](Layer& layer) -> auto& { return layer.parts[kNormWeight]; });
  take("norm_biases", norm_biases, [](Layer& layer) -> auto& { return layer.parts[kNormBias]; });
  take("means", means, [](Layer& layer) -> auto& { return layer.mean; });
  take("variances", variances, [](Layer& layer) -> auto& { return layer.variance; });
  for (size_t i = 0; i < p.size(); ++i)
    TORCH_CHECK_VALUE(network.layers[i].mean.has_value() == network.layers[0].mean.has_value(),
                      "mlp_norm: means are given for all hidden layers or for none");
  return network;
}

Result inference(const at::Tensor& x, at::TensorList weights, const OptionalList& biases, const OptionalList& slopes,
                 const OptionalList& norm_weights, const OptionalList& norm_biases, const OptionalList& means,
                 const OptionalList& variances, const OptionalTensor& seed, std::string_view norm, double eps,
                 std::string_view activation, double negative_slope, at::ArrayRef<double> p) {
  return run(x,
             gather(weights, biases, slopes, norm_weights, norm_biases, means, variances, seed, norm, eps, activation,
                    negative_slope, p),
             nullptr);
}

Result autograd(const at::Tensor& x, at::TensorList weights, const OptionalList& biases, const OptionalList& slopes,
                const OptionalList& norm_weights, const OptionalList& norm_biases, const OptionalList& means,
                const OptionalList& variances, const OptionalTensor& seed, std::string_view norm, double eps,
                std::string_view activation, double negative_slope, at::ArrayRef<double> p) {
  const Network network = gather(weights, biases, slopes, norm_weights, norm_biases, means, variances, seed, norm, eps,
                                 activation, negative_slope, p);
  std::vector<at::Tensor> tensors = {x};
  for (const Layer& layer : network.layers)
    for (const OptionalTensor& part : layer.parts)
      if (part) tensors.push_back(*part);
  bool wanted = false;
  for (const at::Tensor& tensor : tensors) {
    refuse_tangent("mlp", "an argument", tensor);
    wanted = wanted || tensor.requires_grad();
  }
  if (at::GradMode::is_enabled() && wanted) {
    const variable_list results = Node::apply(at::TensorList(tensors), network);
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return run(x, network, nullptr);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mlp_norm(const at::Tensor& x, at::TensorList weights, const OptionalList& biases,
                                            const OptionalList& slopes, const OptionalList& norm_weights,
                                            const OptionalList& norm_biases, const OptionalList& means,
                                            const OptionalList& variances, const OptionalTensor& seed,
                                            std::string_view norm, double eps, std::string_view activation,
                                            double negative_slope, at::ArrayRef<double> p) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlpkit::mlp_norm", "").typed<decltype(mlp_norm)>();
  return op.call(x, weights, biases, slopes, norm_weights, norm_biases, means, variances, seed, norm, eps, activation,
                 negative_slope, p);
}

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  m.def(
      "mlp_norm(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] slopes, Tensor?[] norm_weights, Tensor?[] "
      "norm_biases, Tensor?[] means, Tensor?[] variances, Tensor? seed, str norm, float eps, str activation, float "
      "negative_slope, float[] p) -> (Tensor y, Tensor statistics)");
}

TORCH_LIBRARY_IMPL(mlpkit, CompositeExplicitAutograd, m) { m.impl("mlp_norm", inference); }
TORCH_LIBRARY_IMPL(mlpkit, Autograd, m) { m.impl("mlp_norm", autograd); }

}  // namespace mlpkit
