// norm_act_dropout: schema, checks and C++ autograd (ops). The kernels: norm_act_dropout_cpu.cpp,
// norm_act_dropout_cuda.cpp.
#include "ops/norm_act_dropout.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/dtype.h"

namespace mlpkit {
namespace {

Norm norm_from_name(std::string_view name) {
  if (name == "none") return Norm::none;
  if (name == "batch") return Norm::batch;
  TORCH_CHECK_VALUE(name == "layer", "norm_act_dropout: norm is '", name, "'; it must be one of none, batch, layer");
  return Norm::layer;
}

// 16 bits are little for statistics and parameters: those may be float32 beside a z of 16 bits, as in PyTorch's norms.
void check_parameter(const char* name, const OptionalTensor& tensor, const at::Tensor& z, int64_t cols) {
  if (!tensor) return;
  const bool low = z.scalar_type() == at::kBFloat16 || z.scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(tensor->scalar_type() == z.scalar_type() || (low && tensor->scalar_type() == at::kFloat),
                   "norm_act_dropout: ", name, " is ", tensor->scalar_type(), "; it must be z's ", z.scalar_type(),
                   low ? " or float32" : "");
  TORCH_CHECK_VALUE(tensor->device() == z.device(), "norm_act_dropout: ", name, " is on ", tensor->device(),
                    "; it must be on z's ", z.device());
  TORCH_CHECK_VALUE(cols < 0 || (tensor->dim() == 1 && tensor->size(0) == cols), "norm_act_dropout: ", name,
                    " has shape ", tensor->sizes(), "; it must be (", cols, ")");
}

NormActDropout check_tensors(const NormTensors& tensors, std::string_view norm, std::string_view activation, double p) {
  const at::Tensor& z = tensors.z;
  NormActDropout op;
  op.norm = norm_from_name(norm);
  op.activation = activation_from_name(activation, "norm_act_dropout");
  visit_activation(op.activation, [&](auto formula) { op.needs = decltype(formula)::needs; });
  op.dtype = dtype_of("norm_act_dropout", "z", z);
  TORCH_CHECK_VALUE(z.dim() >= 1, "norm_act_dropout: z has no dimensions; it must be (..., features)");
  op.cols = z.size(-1);
  op.rows = 1;
  for (int64_t i = 0; i + 1 < z.dim(); ++i) op.rows *= z.size(i);
  TORCH_CHECK_VALUE(op.norm != Norm::none || (!tensors.weight && !tensors.bias),
                    "norm_act_dropout: a weight or bias was given; only a norm has them");
  check_parameter("weight", tensors.weight, z, op.cols);
  check_parameter("bias", tensors.bias, z, op.cols);
  check_parameter("slope", tensors.slope, z, -1);
  check_slope_is_there("norm_act_dropout", op, tensors.slope);
  take_dropout("norm_act_dropout", op, p);
  return op;
}

}  // namespace

NormActDropout check_norm_act_dropout(const NormTensors& tensors, const OptionalTensor& mean,
                                      const OptionalTensor& variance, const OptionalTensor& seed, std::string_view norm,
                                      std::string_view activation, double p, int64_t stream) {
  NormActDropout op = check_tensors(tensors, norm, activation, p);
  op.fixed = mean.has_value();
  TORCH_CHECK_VALUE(mean.has_value() == variance.has_value() && (op.norm == Norm::batch || !op.fixed),
                    "norm_act_dropout: mean and variance are given together, and for batch norm alone");
  check_parameter("mean", mean, tensors.z, op.cols);
  check_parameter("variance", variance, tensors.z, op.cols);
  TORCH_CHECK_VALUE(op.norm != Norm::batch || op.fixed || op.rows != 1,
                    "norm_act_dropout: Expected more than 1 value per channel when training, got input size ",
                    tensors.z.sizes());
  check_mask_source("norm_act_dropout", op, p, seed, tensors.z.device(), stream);
  return op;
}

NormActDropout check_norm_act_dropout_backward(const at::Tensor& dy, const NormTensors& tensors, const at::Tensor& mean,
                                               const at::Tensor& inverse, const at::Tensor& bits, std::string_view norm,
                                               bool fixed, std::string_view activation, double p) {
  const at::Tensor& z = tensors.z;
  NormActDropout op = check_tensors(tensors, norm, activation, p);
  op.fixed = fixed;
  TORCH_CHECK_TYPE(dy.scalar_type() == z.scalar_type(), "norm_act_dropout_backward: dy is ", dy.scalar_type(),
                   "; it must be z's ", z.scalar_type());
  TORCH_CHECK_VALUE(dy.sizes() == z.sizes() && dy.device() == z.device(), "norm_act_dropout_backward: dy has shape ",
                    dy.sizes(), " on ", dy.device(), "; it must be ", z.sizes(), " on ", z.device());
  const auto wanted = op.dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  for (const at::Tensor& tensor : {mean, inverse})
    TORCH_CHECK_VALUE(tensor.scalar_type() == wanted && tensor.numel() == op.statistics() && tensor.is_contiguous() &&
                          tensor.device() == z.device(),
                      "norm_act_dropout_backward: mean or inverse has ", tensor.numel(), " elements of ",
                      tensor.scalar_type(), "; it must be the forward pass's, ", op.statistics(), " of ", wanted);
  check_bits("norm_act_dropout_backward", op, bits, z.device());
  return op;
}

NormForwardResult norm_act_dropout_forward(const at::Tensor& z, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& mean,
                                           const OptionalTensor& variance, const OptionalTensor& slope,
                                           const OptionalTensor& seed, std::string_view norm, double eps,
                                           std::string_view activation, double negative_slope, double p, int64_t stream,
                                           bool save) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlpkit::norm_act_dropout_forward", "")
                             .typed<decltype(norm_act_dropout_forward)>();
  return op.call(z, weight, bias, mean, variance, slope, seed, norm, eps, activation, negative_slope, p, stream, save);
}

BackwardResult norm_act_dropout_backward(const at::Tensor& dy, const at::Tensor& z, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& slope,
                                         const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& bits,
                                         std::string_view norm, bool fixed, std::string_view activation,
                                         double negative_slope, double p, std::array<bool, 4> needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlpkit::norm_act_dropout_backward", "")
                             .typed<decltype(norm_act_dropout_backward)>();
  return op.call(dy, z, weight, bias, slope, mean, inverse, bits, norm, fixed, activation, negative_slope, p, needs);
}

NormResult norm_act_dropout(const at::Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& slope,
                            const OptionalTensor& seed, std::string_view norm, double eps, std::string_view activation,
                            double negative_slope, double p, int64_t stream) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlpkit::norm_act_dropout", "")
                             .typed<decltype(norm_act_dropout)>();
  return op.call(z, weight, bias, mean, variance, slope, seed, norm, eps, activation, negative_slope, p, stream);
}

bool saves_input(std::string_view norm, std::string_view activation) {
  Needs needs = Needs::nothing;
  visit_activation(activation_from_name(activation, "norm_act_dropout"),
                   [&](auto formula) { needs = decltype(formula)::needs; });
  return norm != "none" || needs == Needs::preactivation;
}

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  m.def(
      "norm_act_dropout(Tensor z, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, Tensor? slope, Tensor? "
      "seed, str norm, float eps, str activation, float negative_slope, float p, int stream) -> (Tensor y, Tensor "
      "mean, Tensor variance)");
  m.def(
      "norm_act_dropout_forward(Tensor z, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, Tensor? slope, "
      "Tensor? seed, str norm, float eps, str activation, float negative_slope, float p, int stream, bool save) -> "
      "(Tensor y, Tensor mean, Tensor inverse, Tensor variance, Tensor bits)");
  m.def(
      "norm_act_dropout_backward(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor? slope, Tensor mean, Tensor "
      "inverse, Tensor bits, str norm, bool fixed, str activation, float negative_slope, float p, bool[4] needs) -> "
      "(Tensor dz, Tensor dweight, Tensor dbias, Tensor dslope)");
}

}  // namespace mlpkit
