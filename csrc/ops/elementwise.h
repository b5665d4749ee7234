// What the CPU sides of ops with an activation and dropout share: small tensors in the compute dtype, the mask's
// arguments, the planes of saved bits, and sums of partial sums (ops).
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "core/dropout_mask.h"
#include "cpu/linear_act_dropout.h"
#include "ops/linear_act_dropout.h"

namespace mlpkit::elementwise {

inline c10::ScalarType compute_type(Dtype dtype) { return dtype == Dtype::float64 ? at::kDouble : at::kFloat; }

// Element `index` of a contiguous tensor.
inline char* at_element(const at::Tensor& tensor, int64_t index) {
  return static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) + index * tensor.element_size();
}
inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// A contiguous tensor in the compute dtype of `dtype`: a copy where a small tensor is something else.
inline at::Tensor in_compute_dtype(const at::Tensor& tensor, Dtype dtype) {
  const at::Tensor contiguous = tensor.contiguous();
  if (contiguous.scalar_type() == compute_type(dtype)) return contiguous;
  at::Tensor copy = at::empty(contiguous.sizes(), contiguous.options().dtype(at::kFloat));
  cpu::convert({dtype, Dtype::float32, contiguous.const_data_ptr(), copy.mutable_data_ptr(), copy.numel()});
  return copy;
}
inline at::Tensor in_compute_dtype(const OptionalTensor& tensor, Dtype dtype) {
  return tensor ? in_compute_dtype(*tensor, dtype) : at::Tensor();
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

inline Dropout dropout_of(const LinearActDropout& op, const OptionalTensor& seed, int64_t stream) {
  Dropout dropout;
  dropout.threshold = op.threshold;
  dropout.scale = op.scale;
  dropout.stream = static_cast<uint32_t>(stream);
  if (op.draws() && seed) {
    const at::Tensor state = seed->contiguous();
    dropout.seed = static_cast<uint64_t>(state.const_data_ptr<int64_t>()[0]);
    dropout.offset = static_cast<uint32_t>(state.const_data_ptr<int64_t>()[1]);
  }
  return dropout;
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

// Calls body(first, sums, count) with the sums over blocks of rows of per-block column sums [blocks, cols]: some
// columns' after the other, or (total) one of them all.
template <class Body>
void each_sum(const at::Tensor& partials, bool total, Body&& body) {
  constexpr int64_t together = 32;
  const int64_t blocks = partials.size(0), cols = partials.size(1);
  const bool doubles = partials.scalar_type() == at::kDouble;
  const double* wide = doubles ? partials.const_data_ptr<double>() : nullptr;
  const float* narrow = doubles ? nullptr : partials.const_data_ptr<float>();
  CarriedSum of_all;
  for (int64_t first = 0; first < cols; first += together) {
    CarriedSum carried[together];
    const int64_t count = std::min(together, cols - first);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t col = 0; col < count; ++col) {
        const int64_t i = block * cols + first + col;
        (total ? of_all : carried[col]).add(doubles ? wide[i] : narrow[i]);
      }
    double sums[together];
    for (int64_t col = 0; col < count; ++col) sums[col] = carried[col].value();
    if (!total) body(first, sums, count);
  }
  const double sum = of_all.value();
  if (total) body(int64_t{0}, &sum, int64_t{1});
}

inline std::vector<double> sum_blocks(const at::Tensor& partials) {
  std::vector<double> totals(partials.size(1));
  each_sum(partials, false, [&](int64_t first, const double* sums, int64_t count) {
    std::copy(sums, sums + count, totals.begin() + first);
  });
  return totals;
}

// to[first] and on = values, each rounded once to the tensor's dtype, or once to float and then to 16 bits.
inline void round_to(at::Tensor& to, int64_t first, const double* values, int64_t count, Dtype dtype) {
  if (to.scalar_type() == at::kDouble) {
    std::copy(values, values + count, to.mutable_data_ptr<double>() + first);
  } else if (to.scalar_type() == at::kFloat) {
    std::copy(values, values + count, to.mutable_data_ptr<float>() + first);
  } else {
    const std::vector<float> floats(values, values + count);
    cpu::convert({Dtype::float32, dtype, floats.data(), at_element(to, first), count});
  }
}

inline at::Tensor rounded(const std::vector<double>& values, at::IntArrayRef sizes, const at::TensorOptions& options,
                          Dtype dtype) {
  at::Tensor result = at::empty(sizes, options);
  round_to(result, 0, values.data(), static_cast<int64_t>(values.size()), dtype);
  return result;
}

// The sums over blocks, of every column or (where that has one element) of all, rounded.
inline at::Tensor summed(const at::Tensor& partials, at::IntArrayRef sizes, const at::TensorOptions& options,
                         Dtype dtype) {
  at::Tensor result = at::empty(sizes, options);
  each_sum(partials, result.numel() == 1,
           [&](int64_t first, const double* sums, int64_t count) { round_to(result, first, sums, count, dtype); });
  return result;
}

}  // namespace mlpkit::elementwise
