// norm_act_dropout: its node in the autograd graph (ops).
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/norm_act_dropout.h"

namespace mlpkit {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Asked of the arguments, since sizes may be symbols here: whether the statistics are those of this batch's columns,
// which a caller then sees.
bool finds_batch_statistics(std::string_view norm, const OptionalTensor& mean) { return norm == "batch" && !mean; }

NormResult inference(const at::Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& slope,
                     const OptionalTensor& seed, std::string_view norm, double eps, std::string_view activation,
                     double negative_slope, double p, int64_t stream) {
  auto [y, own_mean, inverse, own_variance, bits] = norm_act_dropout_forward(
      z, weight, bias, mean, variance, slope, seed, norm, eps, activation, negative_slope, p, stream, false);
  return {y, finds_batch_statistics(norm, mean) ? own_mean : at::empty_like(own_variance), own_variance};
}

struct Node : torch::autograd::Function<Node> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& z, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& slope, const OptionalTensor& mean,
                               const OptionalTensor& variance, const OptionalTensor& seed, const std::string& norm,
                               double eps, const std::string& activation, double negative_slope, double p,
                               int64_t stream) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, own_mean, inverse, own_variance, bits] = norm_act_dropout_forward(
        z, weight, bias, mean, variance, slope, seed, norm, eps, activation, negative_slope, p, stream, true);
    // z alone serves norm and activation: x and u follow from it again by two multiplications and two additions.
    ctx->save_for_backward({saves_input(norm, activation) ? z : at::Tensor(), undefined_if_absent(weight),
                            undefined_if_absent(bias), undefined_if_absent(slope), own_mean, inverse, bits});
    ctx->saved_data["norm"] = norm;
    ctx->saved_data["fixed"] = mean.has_value();
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["negative_slope"] = negative_slope;
    ctx->saved_data["p"] = p;
    // A copy: what is saved may not be an output as well.
    const at::Tensor seen = finds_batch_statistics(norm, mean) ? own_mean.clone() : at::empty_like(own_variance);
    ctx->mark_non_differentiable({seen, own_variance});
    return {y, seen, own_variance};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    // Absent arguments have no edge, so those behind them move up.
    std::array<bool, 4> needs = {ctx->needs_input_grad(0), false, false, false};
    size_t edge = 1;
    for (size_t i = 1; i < needs.size(); ++i)
      if (saved[i].defined()) needs[i] = ctx->needs_input_grad(edge++);
    // Where z was not saved, only its shape is asked for.
    auto [dz, dweight, dbias, dslope] = norm_act_dropout_backward(
        grads[0], saved[0].defined() ? saved[0] : grads[0], optional(saved[1]), optional(saved[2]), optional(saved[3]),
        saved[4], saved[5], saved[6], ctx->saved_data["norm"].toStringRef(), ctx->saved_data["fixed"].toBool(),
        ctx->saved_data["activation"].toStringRef(), ctx->saved_data["negative_slope"].toDouble(),
        ctx->saved_data["p"].toDouble(), needs);
    variable_list result(13);
    const at::Tensor given[] = {dz, dweight, dbias, dslope};
    for (size_t i = 0; i < needs.size(); ++i)
      if (needs[i]) result[i] = given[i];
    return result;
  }
};

bool requires_grad(const at::Tensor& tensor) { return tensor.requires_grad(); }
bool requires_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

NormResult autograd(const at::Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& slope,
                    const OptionalTensor& seed, std::string_view norm, double eps, std::string_view activation,
                    double negative_slope, double p, int64_t stream) {
  refuse_tangent("norm_act_dropout", "z", z);
  refuse_tangent("norm_act_dropout", "weight", undefined_if_absent(weight));
  refuse_tangent("norm_act_dropout", "bias", undefined_if_absent(bias));
  refuse_tangent("norm_act_dropout", "slope", undefined_if_absent(slope));
  if (at::GradMode::is_enabled()) {
    TORCH_CHECK_NOT_IMPLEMENTED(!requires_grad(mean) && !requires_grad(variance),
                                "norm_act_dropout: mean or variance requires a gradient; they are constants here");
    if (requires_grad(z) || requires_grad(weight) || requires_grad(bias) || requires_grad(slope)) {
      const variable_list results = Node::apply(z, weight, bias, slope, mean, variance, seed, std::string(norm), eps,
                                                std::string(activation), negative_slope, p, stream);
      return {results[0], results[1], results[2]};
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return inference(z, weight, bias, mean, variance, slope, seed, norm, eps, activation, negative_slope, p, stream);
}

// As linear_act_dropout's: differentiating the backward pass says what is missing.
struct BackwardNode : torch::autograd::Function<BackwardNode> {
  static variable_list forward(AutogradContext*, const at::Tensor& dy, const at::Tensor& z,
                               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
                               const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& bits,
                               const std::string& norm, bool fixed, const std::string& activation,
                               double negative_slope, double p, std::array<bool, 4> needs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [dz, dweight, dbias, dslope] = norm_act_dropout_backward(dy, z, weight, bias, slope, mean, inverse, bits, norm,
                                                                  fixed, activation, negative_slope, p, needs);
    return {dz, dweight, dbias, dslope};
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "norm_act_dropout: double backward is not implemented; for second derivatives use "
                                "mlpkit.reference.norm_act_dropout, which is differentiable any number of times");
  }
};

BackwardResult backward_autograd(const at::Tensor& dy, const at::Tensor& z, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& slope, const at::Tensor& mean,
                                 const at::Tensor& inverse, const at::Tensor& bits, std::string_view norm, bool fixed,
                                 std::string_view activation, double negative_slope, double p,
                                 std::array<bool, 4> needs) {
  if (at::GradMode::is_enabled() &&
      (requires_grad(dy) || requires_grad(z) || requires_grad(weight) || requires_grad(bias) || requires_grad(slope))) {
    const auto grads = BackwardNode::apply(dy, z, weight, bias, slope, mean, inverse, bits, std::string(norm), fixed,
                                           std::string(activation), negative_slope, p, needs);
    return {grads[0], grads[1], grads[2], grads[3]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return norm_act_dropout_backward(dy, z, weight, bias, slope, mean, inverse, bits, norm, fixed, activation,
                                   negative_slope, p, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CompositeExplicitAutograd, m) { m.impl("norm_act_dropout", inference); }

TORCH_LIBRARY_IMPL(mlpkit, Autograd, m) {
  m.impl("norm_act_dropout", autograd);
  m.impl("norm_act_dropout_backward", backward_autograd);
}

}  // namespace mlpkit
