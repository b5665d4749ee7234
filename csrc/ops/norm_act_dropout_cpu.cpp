// norm_act_dropout on the CPU: statistics by blocks of rows, then one pass over the elements each way (ops).
#include "cpu/norm_act_dropout.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>

#include "ops/elementwise.h"
#include "ops/norm_act_dropout.h"
#include "ops/tiles.h"

namespace mlpkit {
namespace {

using namespace elementwise;

// Blocks are fixed by the problem alone, so that no sum depends on the number of threads.
constexpr int64_t kBlockRows = 128, kBlockCols = 256;

Tiling blocks_of(const NormActDropout& op) {
  return {op.rows, op.cols, kBlockRows, op.norm == Norm::layer ? std::max<int64_t>(op.cols, 1) : kBlockCols, 0};
}

Region region_of(const NormActDropout& op, const Block& block) {
  return {block.row, block.rows, block.col, block.cols, op.cols};
}

struct Statistics {
  at::Tensor mean, inverse, variance;
};

void invert(const at::Tensor& variance, const at::Tensor& inverse, double eps) {
  for (int64_t i = 0; i < variance.numel(); ++i) {
    if (variance.scalar_type() == at::kDouble)
      inverse.mutable_data_ptr<double>()[i] = inverse_deviation(variance.const_data_ptr<double>()[i], eps);
    else
      inverse.mutable_data_ptr<float>()[i] = inverse_deviation(variance.const_data_ptr<float>()[i], eps);
  }
}

template <class C>
void combine(const NormActDropout& op, const std::vector<double>& means, const std::vector<double>& squares,
             const Statistics& statistics) {
  C* mean = statistics.mean.mutable_data_ptr<C>();
  C* variance = statistics.variance.mutable_data_ptr<C>();
  const auto rows_of = [&](int64_t block) {
    return static_cast<double>(std::min(kBlockRows, op.rows - block * kBlockRows));
  };
  const int64_t blocks = ceil_div(op.rows, kBlockRows);
  for (int64_t col = 0; col < op.cols; ++col) {
    CarriedSum total, deviations;
    for (int64_t block = 0; block < blocks; ++block) total.add(rows_of(block) * means[block * op.cols + col]);
    const double center = total.value() / static_cast<double>(op.rows);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t i = block * op.cols + col;
      deviations.add(squares_around(center, {means[i], squares[i]}, rows_of(block)));
    }
    mean[col] = static_cast<C>(center);
    variance[col] = static_cast<C>(deviations.value() / static_cast<double>(op.rows));
  }
}

// Mean and biased variance of each column of z.
void column_statistics(const NormActDropout& op, const at::Tensor& z, const Statistics& statistics) {
  const int64_t count = ceil_div(op.rows, kBlockRows) * op.cols;
  std::vector<double> means(count), squares(count);
  each_block(blocks_of(op), [&](const Block& block, auto&&) {
    const int64_t begin = block.row / kBlockRows * op.cols;
    cpu::column_moments(
        {region_of(op, block), op.dtype, z.const_data_ptr(), means.data() + begin, squares.data() + begin});
  });
  if (op.dtype == Dtype::float64)
    combine<double>(op, means, squares, statistics);
  else
    combine<float>(op, means, squares, statistics);
}

Statistics statistics_of(const NormActDropout& op, const at::Tensor& z, const OptionalTensor& mean,
                         const OptionalTensor& variance, double eps) {
  const auto options = z.options().dtype(compute_type(op.dtype));
  // Three tensors also where they are empty: results may not share memory.
  const int64_t count = op.statistics();
  Statistics found{at::empty({count}, options), at::empty({count}, options), at::empty({0}, options)};
  if (op.norm == Norm::none) return found;
  if (op.norm == Norm::layer) return found;  // filled row by row, just before the row is used
  if (op.fixed) {
    found.mean.copy_(*mean);
    invert(in_compute_dtype(*variance, op.dtype), found.inverse, eps);
  } else {
    found.variance = at::empty({op.cols}, options);
    if (op.rows > 0)
      column_statistics(op, z, found);
    else
      for (const at::Tensor& tensor : {found.mean, found.variance}) tensor.zero_();
    invert(found.variance, found.inverse, eps);
  }
  return found;
}

NormForwardResult forward(const at::Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& slope,
                          const OptionalTensor& seed, std::string_view norm, double eps, std::string_view activation,
                          double negative_slope, double p, int64_t stream, bool save) {
  const NormActDropout op =
      check_norm_act_dropout({z, weight, bias, slope}, mean, variance, seed, norm, activation, p, stream);
  const at::Tensor inputs = z.contiguous();
  at::Tensor y = at::empty(z.sizes(), z.options());
  at::Tensor bits = at::empty({save ? op.bits_bytes() : 0}, z.options().dtype(at::kByte));
  const Statistics statistics = statistics_of(op, inputs, mean, variance, eps);
  if (y.numel() == 0) return {y, statistics.mean, statistics.inverse, statistics.variance, bits};

  const at::Tensor weights = in_compute_dtype(weight, op.dtype), biases = in_compute_dtype(bias, op.dtype);
  const Slopes slopes(slope, negative_slope, op.dtype);
  const BitPlanes planes(op, bits);
  const Dropout dropout = dropout_of(op, seed, stream);
  const Normalisation normalisation{op.norm,
                                    eps,
                                    at_element(statistics.mean, 0),
                                    at_element(statistics.inverse, 0),
                                    data_or_null(weights),
                                    data_or_null(biases)};
  each_block(blocks_of(op), [&](const Block& block, auto&&) {
    cpu::norm_act_dropout_forward({region_of(op, block), op.dtype, normalisation, op.activation, dropout, slopes.single,
                                   data_or_null(slopes.by_column), inputs.const_data_ptr(), y.mutable_data_ptr(),
                                   planes.keep, planes.positive});
  });
  return {y, statistics.mean, statistics.inverse, statistics.variance, bits};
}

// Column sums of one kind, in parts that each belong to a block of rows; the totals are found once.
class ColumnSums {
 public:
  ColumnSums(const NormActDropout& op, bool wanted, const at::TensorOptions& options) {
    if (!wanted) return;
    parts_ = at::empty({ceil_div(op.rows, kBlockRows), op.cols}, options);
    std::memset(parts_.mutable_data_ptr(), 0, parts_.nbytes());
  }
  void* of(const Block& block) const {
    return parts_.defined() ? at_element(parts_, block.row / kBlockRows * parts_.size(1)) : nullptr;
  }
  const std::vector<double>& totals() {
    if (totals_.empty()) totals_ = sum_blocks(parts_);
    return totals_;
  }
  // As the gradient of `like`, which has one element a column, or one for all.
  at::Tensor gradient_of(const at::Tensor& like, Dtype dtype) {
    const bool by_column = like.numel() == parts_.size(1);
    return by_column ? rounded(totals(), like.sizes(), like.options(), dtype)
                     : summed(parts_, like.sizes(), like.options(), dtype);
  }

 private:
  at::Tensor parts_;
  std::vector<double> totals_;
};

// mean(g) or mean(g x) of batch norm, from the column sums of du or du x,  g = du weight
at::Tensor column_means(const NormActDropout& op, ColumnSums& sums, const at::Tensor& weights,
                        const at::TensorOptions& options) {
  std::vector<double> means = sums.totals();
  for (int64_t col = 0; col < op.cols; ++col) {
    const double weight = !weights.defined()           ? 1.0
                          : op.dtype == Dtype::float64 ? weights.const_data_ptr<double>()[col]
                                                       : weights.const_data_ptr<float>()[col];
    means[col] = means[col] * weight / static_cast<double>(op.rows);
  }
  return rounded(means, {op.cols}, options, op.dtype);
}

BackwardResult backward(const at::Tensor& dy, const at::Tensor& z, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& slope, const at::Tensor& mean,
                        const at::Tensor& inverse, const at::Tensor& bits, std::string_view norm, bool fixed,
                        std::string_view activation, double negative_slope, double p, std::array<bool, 4> needs) {
  const NormActDropout op =
      check_norm_act_dropout_backward(dy, {z, weight, bias, slope}, mean, inverse, bits, norm, fixed, activation, p);
  const auto options = z.options(), compute_options = options.dtype(compute_type(op.dtype));
  const at::Tensor absent = at::empty({0}, options), inputs = z.contiguous(), dys = dy.contiguous();
  const bool taken = op.norm != Norm::none && !fixed;  // the statistics depend on z
  const bool by_batch = taken && op.norm == Norm::batch && needs[0];
  ColumnSums dbias(op, (needs[2] && bias) || by_batch, compute_options);
  ColumnSums dweight(op, (needs[1] && weight) || by_batch, compute_options);
  ColumnSums dslope(op, needs[3] && slope, compute_options);

  const at::Tensor weights = in_compute_dtype(weight, op.dtype), biases = in_compute_dtype(bias, op.dtype);
  const Slopes slopes(slope, negative_slope, op.dtype);
  const BitPlanes planes(op, bits);
  const Dropout dropout = dropout_of(op, std::nullopt, 0);
  const Normalisation normalisation{
      op.norm, 0.0, at_element(mean, 0), at_element(inverse, 0), data_or_null(weights), data_or_null(biases)};
  // g = du weight stays in the compute dtype; where that is z's, in the memory of dz.
  at::Tensor dz = needs[0] ? at::empty(z.sizes(), options) : absent;
  const bool in_place = needs[0] && options.dtype() == compute_options.dtype();
  const at::Tensor g = in_place ? dz : at::empty(z.sizes(), compute_options);
  at::Tensor mean_g, mean_gx;
  const auto finish = [&](const Block& block) {
    cpu::norm_backward({region_of(op, block), op.dtype, normalisation, inputs.const_data_ptr(), g.const_data_ptr(),
                        data_or_null(mean_g), data_or_null(mean_gx), dz.mutable_data_ptr()});
  };
  // Only batch norm has to wait for the sums of all rows.
  each_block(blocks_of(op), [&](const Block& block, auto&&) {
    cpu::norm_act_dropout_backward({region_of(op, block), op.dtype, normalisation, op.activation, dropout,
                                    slopes.single, data_or_null(slopes.by_column), dys.const_data_ptr(),
                                    inputs.const_data_ptr(), planes.keep, planes.positive, g.mutable_data_ptr(),
                                    dbias.of(block), dweight.of(block), dslope.of(block)});
    if (needs[0] && !by_batch && !(in_place && op.norm == Norm::none)) finish(block);
  });
  if (by_batch && z.numel() > 0) {
    mean_g = column_means(op, dbias, weights, compute_options);
    mean_gx = column_means(op, dweight, weights, compute_options);
    each_block(blocks_of(op), [&](const Block& block, auto&&) { finish(block); });
  }
  const auto gradient = [&](ColumnSums& sums, const OptionalTensor& like, bool wanted) {
    return wanted && like ? sums.gradient_of(*like, op.dtype) : absent;
  };
  return {dz, gradient(dweight, weight, needs[1]), gradient(dbias, bias, needs[2]), gradient(dslope, slope, needs[3])};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlpkit, CPU, m) {
  m.impl("norm_act_dropout_forward", forward);
  m.impl("norm_act_dropout_backward", backward);
}

}  // namespace mlpkit
