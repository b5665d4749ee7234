// linear_act_dropout on a CUDA device where the layer is wide: allocation around the kernels that have the element-wise
// part as epilogue of the product, and two operators that run them whatever the choice of kernels (ops). Nothing waits
// for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include "cuda/linear_act_dropout.h"
#include "cuda/wide_linear.h"
#include "ops/cuda_kernels.h"
#include "ops/dtype.h"
#include "ops/linear_act_dropout_cuda.h"
#include "ops/linear_act_dropout_wide.h"

namespace mlpkit {
namespace {

bool fits(const LinearActDropout& op) { return cuda::wide_takes(op.dtype, op.activation, op.rows, op.cols, op.depth); }

// TMA moves 16 bytes at a time.
at::Tensor on_16_bytes(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

void check_fits(const char* name, const LinearActDropout& op) {
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::wide_built(), name, ": this build of mlpkit has no kernels for wide layers; ",
                              "`python -m mlpkit` says why");
  TORCH_CHECK_NOT_IMPLEMENTED(fits(op), name,
                              ": the kernels for wide layers take bfloat16 and float16, any activation ",
                              "but prelu, at least 512 in_features and out_features in multiples of 8, on compute ",
                              "capability 9.0; this is ", op.rows, " x ", op.depth, " -> ", op.cols);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_op(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
    std::string_view activation, double negative_slope, double p, int64_t stream, bool pingpong) {
  const LinearActDropout op = check_linear_act_dropout(x, weight, bias, std::nullopt, seed, activation, p, stream);
  const CudaCall call(x);
  check_fits("linear_act_dropout_wide_forward", op);
  TORCH_CHECK_NOT_IMPLEMENTED(!pingpong || op.dtype == Dtype::bfloat16,
                              "linear_act_dropout_wide_forward: the pingpong schedule takes bfloat16 alone");
  return wide_forward(op, call, x, weight, bias, seed,
                      {negative_slope, static_cast<uint32_t>(stream), true, true, pingpong});
}

// The layer whose z and bits these are, with `depth` outputs of the one that follows it.
LinearActDropout layer_of(const char* name, const at::Tensor& gradient, int64_t cols, int64_t depth,
                          std::string_view activation, double p) {
  LinearActDropout op;
  op.activation = activation_from_name(activation, name);
  visit_activation(op.activation, [&](auto formula) { op.needs = decltype(formula)::needs; });
  op.dtype = dtype_of(name, "dz", gradient);
  op.rows = cols && gradient.dim() ? gradient.numel() / gradient.size(-1) : 0;
  op.cols = cols;
  op.depth = depth;
  take_dropout(name, op, p);
  return op;
}

// The layer's dz and dbias from the dz and the weight of the layer that follows it.
std::tuple<at::Tensor, at::Tensor> backward_op(const at::Tensor& next_dz, const at::Tensor& next_weight,
                                               const at::Tensor& z, const at::Tensor& bits, std::string_view activation,
                                               double negative_slope, double p) {
  constexpr const char* name = "linear_act_dropout_wide_backward";
  TORCH_CHECK_VALUE(next_dz.dim() == 2 && next_weight.dim() == 2 && next_dz.size(1) == next_weight.size(0), name,
                    ": next_dz has shape ", next_dz.sizes(), " and next_weight ", next_weight.sizes(),
                    "; they must be (rows, depth) and (depth, cols)");
  TORCH_CHECK_VALUE(next_dz.scalar_type() == next_weight.scalar_type() && next_dz.device() == next_weight.device(),
                    name, ": next_dz is ", next_dz.scalar_type(), " on ", next_dz.device(), ", next_weight ",
                    next_weight.scalar_type(), " on ", next_weight.device(), "; they must be alike");
  const LinearActDropout op = layer_of(name, next_dz, next_weight.size(1), next_dz.size(1), activation, p);
  const CudaCall call(next_dz);
  check_fits(name, op);
  check_bits(name, op, bits, next_dz.device());
  TORCH_CHECK_VALUE(
      op.needs != Needs::preactivation || (z.sizes() == at::IntArrayRef({op.rows, op.cols}) && z.is_contiguous() &&
                                           z.scalar_type() == next_dz.scalar_type() && z.device() == next_dz.device()),
      name, ": z has shape ", z.sizes(), " of ", z.scalar_type(), "; it must be the forward pass's, (", op.rows, ", ",
      op.cols, ")");

  const auto options = next_dz.options();
  const at::Tensor gradients = on_16_bytes(next_dz), weights = on_16_bytes(next_weight);
  const at::Tensor saved = op.needs == Needs::preactivation ? on_16_bytes(z) : at::Tensor();
  const at::Tensor dz = at::empty({op.rows, op.cols}, options), dbias = at::empty({op.cols}, options);
  const at::Tensor scratch = at::empty({cuda::wide_scratch_elements(op.rows, op.cols)}, options.dtype(at::kFloat));
  const BitPlanes<const uint8_t> planes(op, static_cast<const uint8_t*>(data_or_null(bits)));
  cuda::WideBackward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.depth = op.depth;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.scale = op.scale;
  args.next_dz = gradients.const_data_ptr();
  args.weight = weights.const_data_ptr();
  args.z = saved.defined() ? saved.const_data_ptr() : nullptr;
  args.keep = planes.keep;
  args.positive = planes.positive;
  args.dz = dz.mutable_data_ptr();
  args.dbias = dbias.mutable_data_ptr();
  args.scratch = scratch.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::wide_backward(args, call.stream()));
  return {dz, dbias};
}

// Nobody looks over the dispatcher's shoulder: neither a tensor that stands for another nor a mode.
bool is_plain_cuda(const at::Tensor& tensor) {
  return tensor.is_cuda() && !tensor.key_set().has(c10::DispatchKey::Python) && !c10::impl::dispatch_mode_enabled();
}

}  // namespace

bool takes_wide_kernels(const LinearActDropout& op) { return cuda_kernels() == CudaKernels::all && fits(op); }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wide_forward(
    const LinearActDropout& op, const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, const WideOptions& options) {
  const auto [negative_slope, stream, save, census, pingpong] = options;
  const at::Tensor inputs = on_16_bytes(x), weights = on_16_bytes(weight);
  const at::Tensor biases = bias ? on_16_bytes(*bias) : at::Tensor();
  const at::Tensor state = op.draws() ? seed->contiguous() : at::Tensor();
  const at::Tensor y = at::empty(output_sizes(x, op.cols), x.options());
  const at::Tensor z = save && op.needs == Needs::preactivation ? at::empty_like(y) : at::empty({0}, x.options());
  const at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, x.options().dtype(at::kByte));
  const at::Tensor counts = census ? at::zeros({2}, x.options().dtype(at::kInt)) : at::Tensor();
  const BitPlanes<uint8_t> planes(op, static_cast<uint8_t*>(mutable_data_or_null(bits)));
  cuda::WideForward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.depth = op.depth;
  args.dtype = op.dtype;
  args.schedule = pingpong ? cuda::WideSchedule::pingpong : cuda::WideSchedule::cooperative;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.dropout.stream = stream;
  args.dropout.threshold = op.threshold;
  args.dropout.scale = op.scale;
  args.seed = state.defined() ? state.const_data_ptr<int64_t>() : nullptr;
  args.x = inputs.const_data_ptr();
  args.weight = weights.const_data_ptr();
  args.bias = data_or_null(biases);
  args.y = y.mutable_data_ptr();
  args.z = mutable_data_or_null(z);
  args.keep = planes.keep;
  args.positive = planes.positive;
  args.census = census ? static_cast<cuda::WideCensus*>(counts.mutable_data_ptr()) : nullptr;
  C10_CUDA_CHECK(cuda::wide_forward(args, call.stream()));
  return {y, z, bits, counts};
}

bool wide_kernels_lead(const at::Tensor& dy, const at::Tensor& weight, const SavedLayer& to) {
  if (cuda_kernels() != CudaKernels::all || !is_plain_cuda(dy) || weight.numel() == 0 || dy.numel() == 0) return false;
  if (dy.scalar_type() != weight.scalar_type()) return false;
  const c10::cuda::CUDAGuard device(dy.device());
  return fits(layer_of("mlp", dy, weight.size(1), weight.size(0), to.activation, to.p));
}

std::pair<at::Tensor, at::Tensor> wide_gradient(const at::Tensor& dz, const at::Tensor& weight, const SavedLayer& to) {
  const at::Tensor rows = dz.reshape({-1, dz.size(-1)});
  const at::Tensor z = to.z.numel() ? to.z.view({rows.size(0), weight.size(1)}) : to.z;
  auto [gradient, dbias] = backward_op(rows, weight, z, to.bits, to.activation, to.negative_slope, to.p);
  std::vector<int64_t> sizes = dz.sizes().vec();
  sizes.back() = weight.size(1);
  return {gradient.view(sizes), dbias};
}

std::pair<at::Tensor, at::Tensor> gradient_by_z(const at::Tensor& dy, const SavedLayer& layer) {
  const LinearActDropout op =
      layer_of("mlp", dy, layer.weight.size(0), layer.weight.size(1), layer.activation, layer.p);
  const CudaCall call(dy);
  const at::Tensor dys = dy.contiguous(), dz = at::empty_like(dys), dbias = at::empty({op.cols}, dy.options());
  const at::Tensor scratch =
      at::empty({cuda::scratch_elements(op.rows, op.cols)}, dy.options().dtype(compute_type(op.dtype)));
  const BitPlanes<const uint8_t> planes(op, static_cast<const uint8_t*>(data_or_null(layer.bits)));
  cuda::ActDropoutBackward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = layer.negative_slope;
  args.scale = op.scale;
  args.dy = dys.const_data_ptr();
  args.z = data_or_null(layer.z);
  args.keep = planes.keep;
  args.positive = planes.positive;
  args.dz = dz.mutable_data_ptr();
  args.dbias = dbias.mutable_data_ptr();
  args.scratch = scratch.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::act_dropout_backward(args, call.stream()));
  return {dz, dbias};
}

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  m.def(
      "linear_act_dropout_wide_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seed, str activation, float "
      "negative_slope, float p, int stream, bool pingpong) -> (Tensor y, Tensor z, Tensor bits, Tensor census)");
  m.def(
      "linear_act_dropout_wide_backward(Tensor next_dz, Tensor next_weight, Tensor z, Tensor bits, str activation, "
      "float negative_slope, float p) -> (Tensor dz, Tensor dbias)");
}

TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) {
  m.impl("linear_act_dropout_wide_forward", forward_op);
  m.impl("linear_act_dropout_wide_backward", backward_op);
}

}  // namespace mlpkit
