// linear_act_dropout on the CPU: the product of one tile of the output, and the element-wise pass while the tile is in
// cache (ops).
#include "cpu/linear_act_dropout.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "ops/elementwise.h"
#include "ops/kept_memory.h"
#include "ops/linear_act_dropout.h"
#include "ops/linear_act_dropout_products.h"
#include "ops/tiles.h"

namespace mlpkit {
namespace {

using namespace elementwise;

// absmax: filled with the largest |y| of each block, or nullptr.
ForwardResult forward_of_blocks(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                                double negative_slope, double p, int64_t stream, bool save,
                                std::vector<double>* absmax) {
  const LinearActDropout op = check_linear_act_dropout(x, weight, bias, slope, seed, activation, p, stream);
  at::Tensor y = empty_kept(output_sizes(x, op.cols), x.options());
  const bool saves = save && op.needs == Needs::preactivation;
  at::Tensor z =
      saves ? empty_kept(y.sizes(), x.options().dtype(saved_dtype(x, op.activation))) : at::empty({0}, x.options());
  at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, x.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, z, bits};

  const at::Tensor inputs = x.contiguous(), weights = weight.contiguous();
  const at::Tensor biases = in_compute_dtype(bias, op.dtype);
  const Slopes slopes(slope, negative_slope, op.dtype);
  const BitPlanes planes(op, bits);
  const Dropout dropout = dropout_of(op, seed, stream);
  const Operand left{op.dtype, inputs.const_data_ptr(), op.depth, false};
  const Operand right{op.dtype, weights.const_data_ptr(), op.depth, true};
  const std::array<PassedOver, 2> written = {
      PassedOver{y.const_data_ptr(), op.cols, y.element_size()},
      PassedOver{z.numel() ? z.const_data_ptr() : nullptr, op.cols, z.element_size()}};
  const int64_t down = ceil_div(op.rows, kTileRows);
  if (absmax) absmax->assign(down * ceil_div(op.cols, kTileCols), 0.0);
  each_block({op.rows, op.cols, kTileRows, kTileCols, op.depth}, [&](const Block& block, Scratch& scratch) {
    double* largest = absmax ? &(*absmax)[block.col / kTileCols * down + block.row / kTileRows] : nullptr;
    multiply_in_strips(left, right, op.depth, block, scratch, written,
                       [&](const Block& strip, const void* c, int64_t ldc) {
                         cpu::act_dropout_forward({{strip.row, strip.rows, strip.col, strip.cols, op.cols},
                                                   op.dtype,
                                                   op.activation,
                                                   dropout,
                                                   slopes.single,
                                                   c,
                                                   ldc,
                                                   data_or_null(biases),
                                                   data_or_null(slopes.by_column),
                                                   y.mutable_data_ptr(),
                                                   z.numel() ? z.mutable_data_ptr() : nullptr,
                                                   planes.keep,
                                                   planes.positive,
                                                   largest});
                       });
  });
  return {y, z, bits};
}

ForwardResult forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                      double negative_slope, double p, int64_t stream, bool save) {
  return forward_of_blocks(x, weight, bias, slope, seed, activation, negative_slope, p, stream, save, nullptr);
}

WatchedResult forward_watched(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                              double negative_slope, double p, int64_t stream, bool save) {
  std::vector<double> absmax;
  auto [y, z, bits] =
      forward_of_blocks(x, weight, bias, slope, seed, activation, negative_slope, p, stream, save, &absmax);
  at::Tensor largest = at::zeros({}, x.options().dtype(at::kDouble));
  double& total = *largest.mutable_data_ptr<double>();
  for (const double of_block : absmax) total = larger_magnitude(of_block, total);
  return {y, z, bits, largest};
}

BackwardResult backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                        const OptionalTensor& slope, const at::Tensor& z, const at::Tensor& bits,
                        std::string_view activation, double negative_slope, double p, std::array<bool, 4> needs) {
  const LinearActDropout op = check_linear_act_dropout_backward(dy, x, weight, slope, z, bits, activation, p);
  const at::Tensor dys = dy.contiguous();
  const auto options = x.options(), compute_options = options.dtype(compute_type(op.dtype));
  const bool want_dslope = needs[3] && slope.has_value();
  const at::Tensor absent = at::empty({0}, options);

  const int64_t row_blocks = ceil_div(op.rows, kTileRows);
  const auto partials = [&](bool wanted) {
    if (!wanted) return at::Tensor();
    at::Tensor sums = at::empty({row_blocks, op.cols}, compute_options);
    std::memset(sums.mutable_data_ptr(), 0, sums.nbytes());
    return sums;
  };
  const at::Tensor dbias_partials = partials(needs[2]), dslope_partials = partials(want_dslope);
  const Slopes slopes(slope, negative_slope, op.dtype);
  const BitPlanes planes(op, bits);
  Dropout dropout;
  dropout.threshold = op.threshold;
  dropout.scale = op.scale;
  const auto form_dz = [&](const Block& block, const DzTile& dz) {
    const auto row_of = [&](const at::Tensor& sums) -> void* {
      return sums.defined() ? at_element(sums, block.row / kTileRows * op.cols) : nullptr;
    };
    cpu::act_dropout_backward({{block.row, block.rows, block.col, block.cols, op.cols},
                               op.dtype,
                               op.activation,
                               dropout,
                               slopes.single,
                               dys.const_data_ptr(),
                               z.const_data_ptr(),
                               data_or_null(slopes.by_column),
                               planes.keep,
                               planes.positive,
                               dz,
                               row_of(dbias_partials),
                               row_of(dslope_partials)});
  };

  const at::Tensor inputs = x.contiguous(), weights = weight.contiguous();
  at::Tensor dx = needs[0] ? empty_kept(x.sizes(), options) : absent;
  at::Tensor dweight = needs[1] ? empty_kept(weight.sizes(), options) : absent;
  at::Tensor dbias = absent, dslope = absent;
  multiply_dz({op.rows,
               op.cols,
               op.depth,
               op.dtype,
               inputs.const_data_ptr(),
               weights.const_data_ptr(),
               needs[0] ? dx.mutable_data_ptr() : nullptr,
               needs[1] ? dweight.mutable_data_ptr() : nullptr,
               {PassedOver{dys.const_data_ptr(), op.cols, dys.element_size()},
                PassedOver{z.numel() ? z.const_data_ptr() : nullptr, op.cols, z.element_size()}}},
              form_dz);
  if (needs[2]) dbias = summed(dbias_partials, {op.cols}, options, op.dtype);
  if (want_dslope) dslope = summed(dslope_partials, slope->sizes(), slope->options(), op.dtype);
  return {dx, dweight, dbias, dslope};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CPU, m) {
  m.impl("linear_act_dropout_forward", forward);
  m.impl("linear_act_dropout_forward_watched", forward_watched);
  m.impl("linear_act_dropout_backward", backward);
}

}  // namespace mlpkit
