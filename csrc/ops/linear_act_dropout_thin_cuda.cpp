// linear_act_dropout on a CUDA device where in_features is small: allocation around the kernels that keep product and
// epilogue together (ops). Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "cuda/linear_act_dropout_thin.h"
#include "ops/cuda_kernels.h"
#include "ops/linear_act_dropout_cuda.h"

namespace mlpkit {
namespace {

// The kernels copy 16 bytes at a time; x and weight are the small tensors of such a layer.
at::Tensor on_16_bytes(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

// The gradients of a layer without rows or columns are zero.
BackwardResult zeros(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& slope, int64_t cols,
                     std::array<bool, 4> needs) {
  const auto of = [&](bool wanted, at::IntArrayRef sizes) {
    return wanted ? at::zeros(sizes, x.options()) : at::empty({0}, x.options());
  };
  return {of(needs[0], x.sizes()), of(needs[1], weight.sizes()), of(needs[2], {cols}),
          of(needs[3] && slope, slope ? slope->sizes() : at::IntArrayRef{})};
}

}  // namespace

bool takes_thin_kernels(const LinearActDropout& op) {
  return cuda_kernels() == CudaKernels::all && cuda::thin_takes(op.dtype, op.depth);
}

ForwardResult thin_forward(const LinearActDropout& op, const CudaCall& call, const at::Tensor& x,
                           const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
                           const OptionalTensor& seed, double negative_slope, uint32_t stream, bool save) {
  const at::Tensor inputs = on_16_bytes(x), weights = on_16_bytes(weight);
  const at::Tensor biases = contiguous(bias), slopes = contiguous(slope);
  const at::Tensor state = op.draws() ? seed->contiguous() : at::Tensor();
  const at::Tensor y = at::empty(output_sizes(x, op.cols), x.options());
  const at::Tensor z = save && op.needs == Needs::preactivation ? at::empty_like(y) : at::empty({0}, x.options());
  const at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, x.options().dtype(at::kByte));
  const BitPlanes<uint8_t> planes(op, static_cast<uint8_t*>(mutable_data_or_null(bits)));
  cuda::ThinForward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.depth = op.depth;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.dropout.stream = stream;
  args.dropout.threshold = op.threshold;
  args.dropout.scale = op.scale;
  args.seed = state.defined() ? state.const_data_ptr<int64_t>() : nullptr;
  args.x = data_or_null(inputs);
  args.weight = data_or_null(weights);
  args.bias = data_or_null(biases);
  args.slope = data_or_null(slopes);
  args.slopes = slopes.defined() ? slopes.numel() : 0;
  args.y = mutable_data_or_null(y);
  args.z = mutable_data_or_null(z);
  args.keep = planes.keep;
  args.positive = planes.positive;
  C10_CUDA_CHECK(cuda::thin_forward(args, call.stream()));
  return {y, z, bits};
}

BackwardResult thin_backward(const LinearActDropout& op, const CudaCall& call, const at::Tensor& dy,
                             const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& slope,
                             const at::Tensor& z, const at::Tensor& bits, double negative_slope,
                             std::array<bool, 4> needs) {
  if (op.rows == 0 || op.cols == 0) return zeros(x, weight, slope, op.cols, needs);
  const auto options = x.options();
  const at::Tensor inputs = on_16_bytes(x), weights = on_16_bytes(weight), dys = dy.contiguous();
  const at::Tensor slopes = contiguous(slope), none = at::empty({0}, options);
  const at::Tensor dx = needs[0] ? at::empty(x.sizes(), options) : none;
  const at::Tensor dweight = needs[1] ? at::empty(weight.sizes(), options) : none;
  const at::Tensor dbias = needs[2] ? at::empty({op.cols}, options) : none;
  const at::Tensor dslope = needs[3] && slope ? at::empty(slope->sizes(), options) : none;
  const at::Tensor scratch =
      at::empty({cuda::thin_scratch_elements(op.rows, op.cols, op.depth)}, options.dtype(at::kFloat));
  const BitPlanes<const uint8_t> planes(op, static_cast<const uint8_t*>(data_or_null(bits)));
  cuda::ThinBackward args{};
  args.rows = op.rows;
  args.cols = op.cols;
  args.depth = op.depth;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.scale = op.scale;
  args.dy = dys.const_data_ptr();
  args.x = inputs.const_data_ptr();
  args.weight = weights.const_data_ptr();
  args.z = data_or_null(z);
  args.slope = data_or_null(slopes);
  args.slopes = slopes.defined() ? slopes.numel() : 0;
  args.keep = planes.keep;
  args.positive = planes.positive;
  args.dx = mutable_data_or_null(dx);
  args.dweight = mutable_data_or_null(dweight);
  args.dbias = mutable_data_or_null(dbias);
  args.dslope = mutable_data_or_null(dslope);
  args.scratch = scratch.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::thin_backward(args, call.stream()));
  return {dx, dweight, dbias, dslope};
}

}  // namespace mlpkit
