// linear_act_dropout: schema, checks and C++ autograd (ops). The kernels: linear_act_dropout_cpu.cpp,
// linear_act_dropout_cuda.cpp.
#include "ops/linear_act_dropout.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/dtype.h"

namespace mlpkit {
namespace {

struct NamedActivation {
  std::string_view name;
  Activation activation;
};
constexpr NamedActivation kActivations[] = {
    {"identity", Activation::identity}, {"relu", Activation::relu},       {"leaky_relu", Activation::leaky_relu},
    {"prelu", Activation::prelu},       {"gelu", Activation::gelu},       {"gelu_tanh", Activation::gelu_tanh},
    {"silu", Activation::silu},         {"sigmoid", Activation::sigmoid}, {"tanh", Activation::tanh}};

void check_like(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), "linear_act_dropout: ", name, " is ", tensor.scalar_type(),
                   "; it must be x's ", x.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), "linear_act_dropout: ", name, " is on ", tensor.device(),
                    "; it must be on x's ", x.device());
}

}  // namespace

Activation activation_from_name(std::string_view name, const char* op) {
  std::string known;
  for (const auto& entry : kActivations) {
    if (entry.name == name) return entry.activation;
    known.append(known.empty() ? "" : ", ").append(entry.name);
  }
  TORCH_CHECK_VALUE(false, op, ": activation is '", name, "'; it must be one of ", known);
}

void check_slope_is_there(const char* name, const LinearActDropout& op, const OptionalTensor& slope) {
  TORCH_CHECK_VALUE(slope.has_value() == (op.activation == Activation::prelu), name, ": a slope tensor ",
                    slope ? "was given" : "is missing", "; prelu takes one and the other activations do not");
  if (slope)
    TORCH_CHECK_VALUE(slope->dim() <= 1 && (slope->numel() == 1 || slope->numel() == op.cols), name,
                      ": slope has shape ", slope->sizes(), "; it must have 1 or ", op.cols, " elements");
}

void take_dropout(const char* name, LinearActDropout& op, double p) {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, name, ": p is ", p, "; it must lie in [0, 1]");
  op.threshold = dropout_threshold(p);
  op.scale = dropout_scale(op.threshold);
}

void check_mask_source(const char* name, const LinearActDropout& op, double p, const OptionalTensor& seed,
                       at::Device device, int64_t stream) {
  if (op.draws()) {
    TORCH_CHECK_VALUE(seed.has_value(), name, ": seed is missing; p = ", p, " needs an int64 tensor (seed, offset)");
    TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, name, ": seed is ", seed->scalar_type(), "; it must be int64");
    TORCH_CHECK_VALUE(seed->dim() == 1 && seed->size(0) == 2, name, ": seed has shape ", seed->sizes(),
                      "; it must be (2): seed and offset");
    TORCH_CHECK_VALUE(seed->device() == device, name, ": seed is on ", seed->device(), "; it must be on the input's ",
                      device);
  }
  TORCH_CHECK_VALUE(stream >= 0 && stream <= UINT32_MAX, name, ": stream is ", stream, "; it must lie in [0, 2^32)");
}

void check_bits(const char* name, const LinearActDropout& op, const at::Tensor& bits, at::Device device) {
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.numel() == op.bits_bytes() && bits.is_contiguous() &&
                        bits.device() == device,
                    name, ": bits has ", bits.numel(), " elements of ", bits.scalar_type(), " on ", bits.device(),
                    "; it must be the forward pass's, ", op.bits_bytes(), " bytes");
}

c10::ScalarType saved_dtype(const at::Tensor& x, Activation activation) {
  const bool narrow_slope = x.is_cpu() && x.scalar_type() == at::kBFloat16 && activation != Activation::prelu;
  return narrow_slope ? at::kHalf : x.scalar_type();
}

std::vector<int64_t> output_sizes(const at::Tensor& x, int64_t cols) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = cols;
  return sizes;
}

LinearActDropout check_linear_act_dropout(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& slope, const OptionalTensor& seed,
                                          std::string_view activation, double p, int64_t stream) {
  LinearActDropout op;
  op.activation = activation_from_name(activation, "linear_act_dropout");
  visit_activation(op.activation, [&](auto formula) { op.needs = decltype(formula)::needs; });
  op.dtype = dtype_of("linear_act_dropout", "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "linear_act_dropout: x has no dimensions; it must be (..., in_features)");
  TORCH_CHECK_VALUE(weight.dim() == 2, "linear_act_dropout: weight has ", weight.dim(),
                    " dimensions; it must be (out_features, in_features)");
  op.cols = weight.size(0);
  op.depth = weight.size(1);
  op.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) op.rows *= x.size(i);
  TORCH_CHECK_VALUE(x.size(-1) == op.depth, "linear_act_dropout: x has ", x.size(-1), " features; weight ",
                    weight.sizes(), " wants ", op.depth);
  check_like("weight", weight, x);
  if (bias) {
    check_like("bias", *bias, x);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == op.cols, "linear_act_dropout: bias has shape ",
                      bias->sizes(), "; it must be (", op.cols, ")");
  }
  if (slope) check_like("slope", *slope, x);
  check_slope_is_there("linear_act_dropout", op, slope);
  take_dropout("linear_act_dropout", op, p);
  check_mask_source("linear_act_dropout", op, p, seed, x.device(), stream);
  return op;
}

LinearActDropout check_linear_act_dropout_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                   const OptionalTensor& slope, const at::Tensor& z,
                                                   const at::Tensor& bits, std::string_view activation, double p) {
  LinearActDropout op = check_linear_act_dropout(x, weight, std::nullopt, slope, std::nullopt, activation, 0.0, 0);
  take_dropout("linear_act_dropout_backward", op, p);
  const std::vector<int64_t> sizes = output_sizes(x, op.cols);
  check_like("dy", dy, x);
  TORCH_CHECK_VALUE(dy.sizes() == at::IntArrayRef(sizes), "linear_act_dropout_backward: dy has shape ", dy.sizes(),
                    "; it must be ", at::IntArrayRef(sizes));
  if (op.needs == Needs::preactivation) {
    const c10::ScalarType wanted = saved_dtype(x, op.activation);
    TORCH_CHECK_TYPE(z.scalar_type() == wanted, "linear_act_dropout_backward: z is ", z.scalar_type(),
                     "; it must be the forward pass's, ", wanted);
    TORCH_CHECK_VALUE(z.sizes() == dy.sizes() && z.device() == x.device() && z.is_contiguous(),
                      "linear_act_dropout_backward: z has shape ", z.sizes(), "; it must be the forward pass's, ",
                      dy.sizes());
  }
  check_bits("linear_act_dropout_backward", op, bits, x.device());
  return op;
}

ForwardResult linear_act_dropout_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& slope, const OptionalTensor& seed,
                                         std::string_view activation, double negative_slope, double p, int64_t stream,
                                         bool save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlpkit::linear_act_dropout_forward", "")
                             .typed<decltype(linear_act_dropout_forward)>();
  return op.call(x, weight, bias, slope, seed, activation, negative_slope, p, stream, save);
}

BackwardResult linear_act_dropout_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& slope, const at::Tensor& z, const at::Tensor& bits,
                                           std::string_view activation, double negative_slope, double p,
                                           std::array<bool, 4> needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlpkit::linear_act_dropout_backward", "")
                             .typed<decltype(linear_act_dropout_backward)>();
  return op.call(dy, x, weight, slope, z, bits, activation, negative_slope, p, needs);
}

void refuse_tangent(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.defined() || !tensor._fw_grad(0).defined(), op, ": ", name,
                              " carries a forward-mode tangent; forward-mode differentiation is not implemented");
}

namespace {

at::Tensor inference(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                     double negative_slope, double p, int64_t stream) {
  return std::get<0>(
      linear_act_dropout_forward(x, weight, bias, slope, seed, activation, negative_slope, p, stream, false));
}

struct Node : torch::autograd::Function<Node> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& slope, const OptionalTensor& seed,
                            const std::string& activation, double negative_slope, double p, int64_t stream) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, z, bits] =
        linear_act_dropout_forward(x, weight, bias, slope, seed, activation, negative_slope, p, stream, true);
    ctx->save_for_backward({x, weight, undefined_if_absent(slope), z, bits});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["negative_slope"] = negative_slope;
    ctx->saved_data["p"] = p;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    // Absent arguments have no edge, so those behind them move up.
    const bool has_bias = ctx->saved_data["has_bias"].toBool(), has_slope = saved[2].defined();
    const std::array<bool, 4> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                       has_bias && ctx->needs_input_grad(2),
                                       has_slope && ctx->needs_input_grad(has_bias ? 3 : 2)};
    auto [dx, dweight, dbias, dslope] = linear_act_dropout_backward(
        grads[0], saved[0], saved[1], optional(saved[2]), saved[3], saved[4],
        ctx->saved_data["activation"].toStringRef(), ctx->saved_data["negative_slope"].toDouble(),
        ctx->saved_data["p"].toDouble(), needs);
    const auto asked = [&](int i, const at::Tensor& grad) { return needs[i] ? grad : at::Tensor(); };
    torch::autograd::variable_list result(9);
    result[0] = asked(0, dx);
    result[1] = asked(1, dweight);
    result[2] = asked(2, dbias);
    result[3] = asked(3, dslope);
    return result;
  }
};

bool requires_grad(const at::Tensor& tensor) { return tensor.requires_grad(); }
bool requires_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

at::Tensor autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                    double negative_slope, double p, int64_t stream) {
  refuse_tangent("linear_act_dropout", "x", x);
  refuse_tangent("linear_act_dropout", "weight", weight);
  refuse_tangent("linear_act_dropout", "bias", undefined_if_absent(bias));
  refuse_tangent("linear_act_dropout", "slope", undefined_if_absent(slope));
  if (at::GradMode::is_enabled() &&
      (requires_grad(x) || requires_grad(weight) || requires_grad(bias) || requires_grad(slope)))
    return Node::apply(x, weight, bias, slope, seed, std::string(activation), negative_slope, p, stream);
  at::AutoDispatchBelowADInplaceOrView guard;
  return inference(x, weight, bias, slope, seed, activation, negative_slope, p, stream);
}

// The backward pass as a node of its own, so that differentiating it says what is missing instead of giving a silent
// zero.
struct BackwardNode : torch::autograd::Function<BackwardNode> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const at::Tensor& dy,
                                                const at::Tensor& x, const at::Tensor& weight,
                                                const OptionalTensor& slope, const at::Tensor& z,
                                                const at::Tensor& bits, const std::string& activation,
                                                double negative_slope, double p, std::array<bool, 4> needs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [dx, dweight, dbias, dslope] =
        linear_act_dropout_backward(dy, x, weight, slope, z, bits, activation, negative_slope, p, needs);
    return {dx, dweight, dbias, dslope};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "linear_act_dropout: double backward is not implemented; for second derivatives use "
                                "mlpkit.reference.linear_act_dropout, which is differentiable any number of times");
  }
};

BackwardResult backward_autograd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& slope, const at::Tensor& z, const at::Tensor& bits,
                                 std::string_view activation, double negative_slope, double p,
                                 std::array<bool, 4> needs) {
  if (at::GradMode::is_enabled() &&
      (requires_grad(dy) || requires_grad(x) || requires_grad(weight) || requires_grad(slope))) {
    const auto grads =
        BackwardNode::apply(dy, x, weight, slope, z, bits, std::string(activation), negative_slope, p, needs);
    return {grads[0], grads[1], grads[2], grads[3]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_act_dropout_backward(dy, x, weight, slope, z, bits, activation, negative_slope, p, needs);
}

}  // namespace

at::Tensor linear_act_dropout(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                              double negative_slope, double p, int64_t stream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlpkit::linear_act_dropout", "")
                             .typed<decltype(linear_act_dropout)>();
  return op.call(x, weight, bias, slope, seed, activation, negative_slope, p, stream);
}

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  m.def(
      "linear_act_dropout(Tensor x, Tensor weight, Tensor? bias, Tensor? slope, Tensor? seed, str activation, float "
      "negative_slope, "
      "float p, int stream) -> Tensor");
  m.def(
      "linear_act_dropout_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? slope, Tensor? seed, str activation, "
      "float negative_slope, float p, int stream, bool save) -> (Tensor y, Tensor z, Tensor bits)");
  // The same, and the largest |y| from the epilogue: float64 without dimensions, NaN where y holds one. CPU only.
  m.def(
      "linear_act_dropout_forward_watched(Tensor x, Tensor weight, Tensor? bias, Tensor? slope, Tensor? seed, str "
      "activation, float negative_slope, float p, int stream, bool save) -> (Tensor y, Tensor z, Tensor bits, Tensor "
      "absmax)");
  m.def(
      "linear_act_dropout_backward(Tensor dy, Tensor x, Tensor weight, Tensor? slope, Tensor z, Tensor bits, str "
      "activation, "
      "float negative_slope, float p, bool[4] needs) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dslope)");
}

TORCH_LIBRARY_IMPL(mlpkit, CompositeExplicitAutograd, m) { m.impl("linear_act_dropout", inference); }

TORCH_LIBRARY_IMPL(mlpkit, Autograd, m) {
  m.impl("linear_act_dropout", autograd);
  m.impl("linear_act_dropout_backward", backward_autograd);
}

}  // namespace mlpkit
