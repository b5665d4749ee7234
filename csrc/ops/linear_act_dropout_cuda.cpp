// linear_act_dropout on a CUDA device: the library's GEMM and one fused element-wise kernel each way, or the kernels
// for few in_features or for wide layers (ops).
//
// The forward product is taken in fp32 for bf16 and f16 (aten::mm.dtype), so that bias, activation and dropout see what
// the GEMM accumulated and the result is rounded once; the gradients' GEMMs take dz rounded to the dtype, accumulate in
// fp32 and round once. All work goes to the current stream of x's device; nothing waits for it, and the seed stays on
// the device, so a call can be captured in a CUDA graph.
#include "cuda/linear_act_dropout.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/linear_act_dropout_cuda.h"
#include "ops/linear_act_dropout_wide.h"
#include "ops/split_product.h"

namespace mlpkit {
namespace {

bool changes_nothing(const LinearActDropout& op) { return op.activation == Activation::identity && op.threshold == 0; }

// The fp32 product of bf16 and f16 is made in panels of rows, so that it takes 128 MiB at most whatever the batch; a
// panel is work enough to hide its two launches. Panels are whole mask tiles.
constexpr int64_t kPanelBytes = int64_t{1} << 27;

int64_t panel_rows(const LinearActDropout& op, bool in_place) {
  const int64_t rows = kPanelBytes / (op.cols * static_cast<int64_t>(sizeof(float))) / kMaskTile * kMaskTile;
  return in_place ? op.rows : std::min(op.rows, std::max<int64_t>(rows, kMaskTile));
}

// to = x W^T, in the compute type
void multiply_by_weight(const at::Tensor& x, const at::Tensor& weight, at::Tensor to) {
  if (x.size(1) == 0)
    to.zero_();
  else if (to.scalar_type() == x.scalar_type())
    matrix_product_out(to, x, weight.t());
  else
    at::mm_out(to, x, weight.t(), to.scalar_type());
}

ForwardResult forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                      double negative_slope, double p, int64_t stream, bool save) {
  const LinearActDropout op = check_linear_act_dropout(x, weight, bias, slope, seed, activation, p, stream);
  const CudaCall call(x);
  const at::Tensor inputs = x.reshape({op.rows, op.depth});
  const std::vector<int64_t> sizes = output_sizes(x, op.cols);
  const at::Tensor none = at::empty({0}, x.options());
  at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, x.options().dtype(at::kByte));
  if (changes_nothing(op) && !takes_split_product(inputs, weight.t())) {
    // the library adds the bias before it rounds
    const at::Tensor y = bias ? at::addmm(*bias, inputs, weight.t()) : at::mm(inputs, weight.t());
    return {y.view(sizes), none, bits};
  }

  if (takes_thin_kernels(op))
    return thin_forward(op, call, x, weight, bias, slope, seed, negative_slope, static_cast<uint32_t>(stream), save);
  if (takes_wide_kernels(op)) {
    const WideOptions options{negative_slope, static_cast<uint32_t>(stream), save};
    auto [y, z, saved, census] = wide_forward(op, call, x, weight, bias, seed, options);
    return {y, z, saved};
  }

  at::Tensor y = at::empty(sizes, x.options());
  at::Tensor z = save && op.needs == Needs::preactivation ? at::empty_like(y) : none;
  if (y.numel() == 0) return {y, z, bits};
  const at::Tensor biases = contiguous(bias), slopes = contiguous(slope);
  const at::Tensor state = op.draws() ? seed->contiguous() : at::Tensor();
  const BitPlanes<uint8_t> planes(op, static_cast<uint8_t*>(mutable_data_or_null(bits)));
  cuda::ActDropoutForward args{};
  args.cols = op.cols;
  args.dtype = op.dtype;
  args.activation = op.activation;
  args.negative_slope = negative_slope;
  args.dropout.stream = static_cast<uint32_t>(stream);
  args.dropout.threshold = op.threshold;
  args.dropout.scale = op.scale;
  args.seed = state.defined() ? state.const_data_ptr<int64_t>() : nullptr;
  args.bias = data_or_null(biases);
  args.slope = data_or_null(slopes);
  args.slopes = slopes.defined() ? slopes.numel() : 0;

  const bool in_place = compute_type(op.dtype) == x.scalar_type();
  const int64_t panel = panel_rows(op, in_place), col_tiles = (op.cols + kMaskTile - 1) / kMaskTile;
  const at::Tensor outputs = y.view({op.rows, op.cols});
  const at::Tensor products =
      in_place ? outputs : at::empty({panel, op.cols}, x.options().dtype(compute_type(op.dtype)));
  for (int64_t row = 0; row < op.rows; row += panel) {
    args.rows = std::min(panel, op.rows - row);
    args.first_tile = row / kMaskTile * col_tiles;
    multiply_by_weight(inputs.narrow(0, row, args.rows), weight, products.narrow(0, 0, args.rows));
    args.product = products.const_data_ptr();
    args.y = outputs.narrow(0, row, args.rows).mutable_data_ptr();
    args.z = z.numel() ? z.view({op.rows, op.cols}).narrow(0, row, args.rows).mutable_data_ptr() : nullptr;
    args.keep = planes.keep ? planes.keep + args.first_tile * kMaskLanes : nullptr;
    args.positive = planes.positive ? planes.positive + args.first_tile * kMaskLanes : nullptr;
    C10_CUDA_CHECK(cuda::act_dropout_forward(args, call.stream()));
  }
  return {y, z, bits};
}

BackwardResult backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                        const OptionalTensor& slope, const at::Tensor& z, const at::Tensor& bits,
                        std::string_view activation, double negative_slope, double p, std::array<bool, 4> needs) {
  const LinearActDropout op = check_linear_act_dropout_backward(dy, x, weight, slope, z, bits, activation, p);
  const CudaCall call(x);
  if (takes_thin_kernels(op) && !changes_nothing(op))
    return thin_backward(op, call, dy, x, weight, slope, z, bits, negative_slope, needs);
  const bool want_dz = needs[0] || needs[1], want_dbias = needs[2], want_dslope = needs[3] && slope.has_value();
  const bool empty = op.rows == 0 || op.cols == 0;
  const auto options = x.options();
  const at::Tensor none = at::empty({0}, options), dys = dy.contiguous(), slopes = contiguous(slope);
  const auto sums_like = [&](at::IntArrayRef sizes) {
    return empty ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  at::Tensor dbias = want_dbias ? sums_like({op.cols}) : none;
  at::Tensor dslope = want_dslope ? sums_like(slope->sizes()) : none;
  at::Tensor dz =
      want_dz && !changes_nothing(op) ? at::empty({op.rows, op.cols}, options) : dys.reshape({op.rows, op.cols});

  if (!empty && (want_dbias || want_dslope || (want_dz && !changes_nothing(op)))) {
    const int64_t scratch_elements = want_dbias || want_dslope ? cuda::scratch_elements(op.rows, op.cols) : 0;
    const at::Tensor scratch = at::empty({scratch_elements}, options.dtype(compute_type(op.dtype)));
    const BitPlanes<const uint8_t> planes(op, static_cast<const uint8_t*>(data_or_null(bits)));
    cuda::ActDropoutBackward args{};
    args.rows = op.rows;
    args.cols = op.cols;
    args.dtype = op.dtype;
    args.activation = op.activation;
    args.negative_slope = negative_slope;
    args.scale = op.scale;
    args.dy = dys.const_data_ptr();
    args.z = data_or_null(z);
    args.slope = data_or_null(slopes);
    args.slopes = slopes.defined() ? slopes.numel() : 0;
    args.keep = planes.keep;
    args.positive = planes.positive;
    args.dz = want_dz && !changes_nothing(op) ? dz.mutable_data_ptr() : nullptr;
    args.dbias = want_dbias ? dbias.mutable_data_ptr() : nullptr;
    args.dslope = want_dslope ? dslope.mutable_data_ptr() : nullptr;
    args.scratch = mutable_data_or_null(scratch);
    C10_CUDA_CHECK(cuda::act_dropout_backward(args, call.stream()));
  }

  at::Tensor dx = needs[0] ? matrix_product(dz, weight).view(x.sizes()) : none;
  at::Tensor dweight = needs[1] ? matrix_product(dz.t(), x.reshape({op.rows, op.depth})) : none;
  return {dx, dweight, dbias, dslope};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CUDA, m) {
  m.impl("linear_act_dropout_forward", forward);
  m.impl("linear_act_dropout_backward", backward);
}

}  // namespace mlpkit
