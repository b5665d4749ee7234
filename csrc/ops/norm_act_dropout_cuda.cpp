// norm_act_dropout on a CUDA device: statistics and norm by ATen in the compute type, activation and dropout by the
// kernels of linear_act_dropout, which have the mask of the contract (ops). All work goes to the current stream of z's
// device, and nothing waits for it.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/var_mean.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/linear_act_dropout.h"
#include "ops/norm_act_dropout.h"

namespace mlpkit {
namespace {

// z's device current, and neither autograd nor autocast between us and ATen.
struct CudaCall {
  explicit CudaCall(const at::Tensor& z) : device(z.device()), no_autocast(c10::autocast_dispatch_keyset) {}
  c10::cuda::CUDAGuard device;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast;
};

at::Tensor in_compute_type(const at::Tensor& tensor, const NormActDropout& op) {
  return tensor.to(op.dtype == Dtype::float64 ? at::kDouble : at::kFloat);
}

// A statistic or parameter beside [rows, cols]: one a row for layer norm's statistics, otherwise one a column.
at::Tensor beside(const at::Tensor& tensor, bool by_row) { return tensor.reshape({by_row ? -1 : 1, by_row ? 1 : -1}); }

// x = (z - mean) inverse,  u = x weight + bias
at::Tensor normalised_on_device(const NormActDropout& op, const at::Tensor& z, const at::Tensor& mean,
                                const at::Tensor& inverse) {
  const at::Tensor wide = in_compute_type(z.reshape({op.rows, op.cols}), op);
  if (op.norm == Norm::none) return wide;
  const bool by_row = op.norm == Norm::layer;
  return (wide - beside(mean, by_row)) * beside(inverse, by_row);
}
at::Tensor affine_on_device(const NormActDropout& op, const at::Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& bias) {
  at::Tensor u = x;
  if (weight) u = u * in_compute_type(*weight, op);
  if (bias) u = u + in_compute_type(*bias, op);
  return u.contiguous();
}

struct Statistics {
  at::Tensor mean, inverse, variance;
};

Statistics statistics_of(const NormActDropout& op, const at::Tensor& z, const OptionalTensor& mean,
                         const OptionalTensor& variance, double eps) {
  // Tensors of their own also where they are empty: results may not share memory.
  const auto none = [&] {
    return at::empty({0}, z.options().dtype(op.dtype == Dtype::float64 ? at::kDouble : at::kFloat));
  };
  if (op.norm == Norm::none) return {none(), none(), none()};
  if (op.fixed) {
    const at::Tensor fixed = in_compute_type(*mean, op).clone();
    return {fixed.contiguous(), at::rsqrt(in_compute_type(*variance, op) + eps).contiguous(), none()};
  }
  const at::Tensor wide = in_compute_type(z.reshape({op.rows, op.cols}), op);
  const int64_t dimension = op.norm == Norm::layer ? 1 : 0;
  auto [found, center] = at::var_mean(wide, at::IntArrayRef{dimension}, at::Scalar(0), false);
  return {center, at::rsqrt(found + eps), op.norm == Norm::batch ? found : none()};
}

NormForwardResult forward(const at::Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& slope,
                          const OptionalTensor& seed, std::string_view norm, double eps, std::string_view activation,
                          double negative_slope, double p, int64_t stream, bool save) {
  const NormActDropout op =
      check_norm_act_dropout({z, weight, bias, slope}, mean, variance, seed, norm, activation, p, stream);
  const CudaCall call(z);
  at::Tensor y = at::empty(z.sizes(), z.options());
  at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, z.options().dtype(at::kByte));
  const Statistics statistics = statistics_of(op, z, mean, variance, eps);
  const NormForwardResult result{y, statistics.mean, statistics.inverse, statistics.variance, bits};
  if (y.numel() == 0) return result;

  const at::Tensor u =
      affine_on_device(op, normalised_on_device(op, z, statistics.mean, statistics.inverse), weight, bias);
  const at::Tensor slopes = slope ? slope->to(z.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor state = op.draws() ? seed->contiguous() : at::Tensor();
  uint8_t* planes = bits.numel() ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  cuda::ActDropoutForward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.dropout.stream = static_cast<uint32_t>(stream);
  args.dropout.threshold = op.threshold;
  args.dropout.scale = op.scale;
  args.seed = state.defined() ? state.const_data_ptr<int64_t>() : nullptr;
  args.product = u.const_data_ptr();
  args.slope = slopes.defined() ? slopes.const_data_ptr() : nullptr;
  args.slopes = slopes.defined() ? slopes.numel() : 0;
  args.y = y.mutable_data_ptr();
  args.keep = op.keeps_bits() ? planes : nullptr;
  args.positive = planes && op.keeps_sign() ? planes + (op.keeps_bits() ? op.plane_bytes() : 0) : nullptr;
  C10_CUDA_CHECK(cuda::act_dropout_forward(args, c10::cuda::getCurrentCUDAStream().stream()));
  return result;
}

struct ActivationGradient {
  at::Tensor du, dslope;  // du: [rows, cols], z's dtype
};

ActivationGradient activation_gradient(const NormActDropout& op, const at::Tensor& dy, const at::Tensor& u,
                                       const OptionalTensor& slope, const at::Tensor& bits, double negative_slope,
                                       bool want_dslope) {
  const at::Tensor dys = dy.contiguous(), saved = u.to(dy.scalar_type()).contiguous();
  const at::Tensor slopes = slope ? slope->to(dy.scalar_type()).contiguous() : at::Tensor();
  ActivationGradient found{at::empty({op.rows, op.cols}, dy.options()), at::Tensor()};
  if (want_dslope) found.dslope = at::zeros_like(slopes);
  if (dy.numel() == 0) return found;
  const at::Tensor scratch = at::empty({want_dslope ? cuda::scratch_elements(op.rows, op.cols) : 0}, u.options());
  const uint8_t* planes = bits.numel() ? bits.const_data_ptr<uint8_t>() : nullptr;
  cuda::ActDropoutBackward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.scale = op.scale;
  args.dy = dys.const_data_ptr();
  args.z = op.needs == Needs::preactivation ? saved.const_data_ptr() : nullptr;
  args.slope = slopes.defined() ? slopes.const_data_ptr() : nullptr;
  args.slopes = slopes.defined() ? slopes.numel() : 0;
  args.keep = op.keeps_bits() ? planes : nullptr;
  args.positive = planes && op.keeps_sign() ? planes + (op.keeps_bits() ? op.plane_bytes() : 0) : nullptr;
  args.dz = found.du.mutable_data_ptr();
  args.dslope = want_dslope ? found.dslope.mutable_data_ptr() : nullptr;
  args.scratch = scratch.numel() ? scratch.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(cuda::act_dropout_backward(args, c10::cuda::getCurrentCUDAStream().stream()));
  return found;
}

BackwardResult backward(const at::Tensor& dy, const at::Tensor& z, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& slope, const at::Tensor& mean,
                        const at::Tensor& inverse, const at::Tensor& bits, std::string_view norm, bool fixed,
                        std::string_view activation, double negative_slope, double p, std::array<bool, 4> needs) {
  const NormActDropout op =
      check_norm_act_dropout_backward(dy, {z, weight, bias, slope}, mean, inverse, bits, norm, fixed, activation, p);
  const CudaCall call(z);
  const at::Tensor absent = at::empty({0}, z.options());
  const at::Tensor x = normalised_on_device(op, z, mean, inverse), u = affine_on_device(op, x, weight, bias);
  const bool want_dslope = needs[3] && slope.has_value();
  const auto [rounded, dslope] = activation_gradient(op, dy, u, slope, bits, negative_slope, want_dslope);
  const at::Tensor du = in_compute_type(rounded, op), g = weight ? du * in_compute_type(*weight, op) : du;
  at::Tensor dz = absent;
  if (needs[0] && op.norm == Norm::none) {
    dz = rounded.view(z.sizes());
  } else if (needs[0]) {
    const bool by_row = op.norm == Norm::layer;
    const int64_t dimension = by_row ? 1 : 0;
    at::Tensor rest = g;
    if (!fixed) rest = g - g.mean({dimension}, true) - x * (g * x).mean({dimension}, true);
    dz = (rest * beside(inverse, by_row)).to(z.scalar_type()).view(z.sizes());
  }
  const auto column_sum = [&](bool wanted, const OptionalTensor& like, const at::Tensor& terms) {
    return wanted && like ? terms.sum({0}).to(like->scalar_type()) : absent;
  };
  return {dz, column_sum(needs[1], weight, du * x), column_sum(needs[2], bias, du),
          want_dslope ? dslope.to(slope->scalar_type()) : absent};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) {
  m.impl("norm_act_dropout_forward", forward);
  m.impl("norm_act_dropout_backward", backward);
}

}  // namespace mlpkit
