// linear_act_dropout on the CPU: the product of one tile of the output, and the element-wise pass while the tile is in
// cache (ops).
#include "cpu/linear_act_dropout.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "ops/linear_act_dropout.h"
#include "ops/linear_act_dropout_products.h"
#include "ops/tiles.h"

namespace mlpkit {
namespace {

c10::ScalarType compute_type(Dtype dtype) { return dtype == Dtype::float64 ? at::kDouble : at::kFloat; }
bool low_precision(Dtype dtype) { return dtype == Dtype::bfloat16 || dtype == Dtype::float16; }

// Element `index` of a contiguous tensor.
char* at_element(const at::Tensor& tensor, int64_t index) {
  return static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) + index * tensor.element_size();
}

// A contiguous copy of a small tensor in the compute dtype; the tensor itself where it is already that.
at::Tensor in_compute_dtype(const at::Tensor& tensor, Dtype dtype) {
  const at::Tensor contiguous = tensor.contiguous();
  if (!low_precision(dtype)) return contiguous;
  at::Tensor copy = at::empty(contiguous.sizes(), contiguous.options().dtype(at::kFloat));
  cpu::convert({dtype, Dtype::float32, contiguous.const_data_ptr(), copy.mutable_data_ptr(), copy.numel()});
  return copy;
}

// prelu's slope as the kernels take it: one for each column, or a single number.
struct Slopes {
  at::Tensor by_column;
  double single;
  Slopes(const OptionalTensor& slope, double negative_slope, Dtype dtype) : single(negative_slope) {
    if (!slope) return;
    const at::Tensor values = in_compute_dtype(*slope, dtype);
    if (slope->numel() > 1)
      by_column = values;
    else
      single = dtype == Dtype::float64 ? *values.const_data_ptr<double>() : *values.const_data_ptr<float>();
  }
};

const void* data_or_null(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

// The two bit planes of a saved `bits` tensor; null where the op keeps none.
struct BitPlanes {
  uint16_t* keep = nullptr;
  uint16_t* positive = nullptr;
  BitPlanes(const LinearActDropout& op, const at::Tensor& bits) {
    if (bits.numel() == 0) return;
    char* base = at_element(bits, 0);
    if (op.keeps_bits()) keep = reinterpret_cast<uint16_t*>(base);
    if (op.keeps_sign()) positive = reinterpret_cast<uint16_t*>(base + (op.keeps_bits() ? op.plane_bytes() : 0));
  }
};

Dropout dropout_of(const LinearActDropout& op, const OptionalTensor& seed, int64_t stream) {
  Dropout dropout;
  dropout.threshold = op.threshold;
  dropout.scale = op.scale;
  dropout.stream = static_cast<uint32_t>(stream);
  if (op.draws()) {
    const at::Tensor state = seed->contiguous();
    dropout.seed = static_cast<uint64_t>(state.const_data_ptr<int64_t>()[0]);
    dropout.offset = static_cast<uint32_t>(state.const_data_ptr<int64_t>()[1]);
  }
  return dropout;
}

ForwardResult forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& slope, const OptionalTensor& seed, std::string_view activation,
                      double negative_slope, double p, int64_t stream, bool save) {
  const LinearActDropout op = check_linear_act_dropout(x, weight, bias, slope, seed, activation, p, stream);
  at::Tensor y = at::empty(output_sizes(x, op.cols), x.options());
  const bool saves = save && op.needs == Needs::preactivation;
  at::Tensor z =
      saves ? at::empty(y.sizes(), x.options().dtype(saved_dtype(x, op.activation))) : at::empty({0}, x.options());
  at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, x.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, z, bits};

  const at::Tensor inputs = x.contiguous(), weights = weight.contiguous();
  const at::Tensor biases = bias ? in_compute_dtype(*bias, op.dtype) : at::Tensor();
  const Slopes slopes(slope, negative_slope, op.dtype);
  const BitPlanes planes(op, bits);
  const Dropout dropout = dropout_of(op, seed, stream);
  const Operand left{op.dtype, inputs.const_data_ptr(), op.depth, false};
  const Operand right{op.dtype, weights.const_data_ptr(), op.depth, true};
  each_block({op.rows, op.cols, kTileRows, kTileCols, op.depth}, [&](const Block& block, Scratch& scratch) {
    multiply(left, right, op.depth, block, scratch.tile(), block.cols, scratch);
    cpu::act_dropout_forward({{block.row, block.rows, block.col, block.cols, op.cols},
                              op.dtype,
                              op.activation,
                              dropout,
                              slopes.single,
                              scratch.tile(),
                              block.cols,
                              data_or_null(biases),
                              data_or_null(slopes.by_column),
                              y.mutable_data_ptr(),
                              z.numel() ? z.mutable_data_ptr() : nullptr,
                              planes.keep,
                              planes.positive});
  });
  return {y, z, bits};
}

// A sum that carries its rounding error along (Neumaier 1974), in fp64.
struct CarriedSum {
  double sum = 0.0, carry = 0.0;
  void add(double value) {
    const double next = sum + value;
    carry += std::abs(sum) >= std::abs(value) ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  // Where the sum is Inf or NaN, the carry is a meaningless NaN.
  double value() const { return std::isfinite(sum) ? sum + carry : sum; }
};

// The sum over blocks of rows of per-block column sums, as a tensor like `like`: one sum a column, or one of them all.
at::Tensor sum_partials(const at::Tensor& partials, const at::Tensor& like, Dtype dtype) {
  const int64_t blocks = partials.size(0), cols = partials.size(1), sums = like.numel() == cols ? cols : 1;
  const bool doubles = partials.scalar_type() == at::kDouble;
  std::vector<CarriedSum> carried(sums);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t col = 0; col < cols; ++col) {
      const int64_t i = block * cols + col;
      carried[sums == 1 ? 0 : col].add(doubles ? partials.const_data_ptr<double>()[i]
                                               : partials.const_data_ptr<float>()[i]);
    }
  at::Tensor total = at::empty(like.sizes(), partials.options());
  for (int64_t i = 0; i < sums; ++i) {
    if (doubles)
      total.mutable_data_ptr<double>()[i] = carried[i].value();
    else
      total.mutable_data_ptr<float>()[i] = static_cast<float>(carried[i].value());
  }
  if (!low_precision(dtype)) return total;
  at::Tensor rounded = at::empty(like.sizes(), like.options());
  cpu::convert({Dtype::float32, dtype, total.const_data_ptr(), rounded.mutable_data_ptr(), total.numel()});
  return rounded;
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
  at::Tensor dx = needs[0] ? at::empty(x.sizes(), options) : absent;
  at::Tensor dweight = needs[1] ? at::empty(weight.sizes(), options) : absent;
  at::Tensor dbias = absent, dslope = absent;
  multiply_dz({op.rows, op.cols, op.depth, op.dtype, inputs.const_data_ptr(), weights.const_data_ptr(),
               needs[0] ? dx.mutable_data_ptr() : nullptr, needs[1] ? dweight.mutable_data_ptr() : nullptr},
              form_dz);
  if (needs[2]) dbias = sum_partials(dbias_partials, at::empty({op.cols}, options), op.dtype);
  if (want_dslope) dslope = sum_partials(dslope_partials, *slope, op.dtype);
  return {dx, dweight, dbias, dslope};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CPU, m) {
  m.impl("linear_act_dropout_forward", forward);
  m.impl("linear_act_dropout_backward", backward);
}

}  // namespace mlpkit
