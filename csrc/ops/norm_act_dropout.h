// norm_act_dropout: the operator, its two halves, and what their CPU and CUDA sides share (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>
#include <tuple>

#include "core/norm.h"
#include "ops/linear_act_dropout.h"

namespace mlpkit {

// The problem as two-dimensional sizes: z and y are [rows, cols]. fixed: mean and variance were given.
struct NormActDropout : LinearActDropout {
  Norm norm = Norm::none;
  bool fixed = false;

  // How many rows or columns each have statistics of their own, and over how many numbers these go.
  int64_t statistics() const { return norm == Norm::none ? 0 : norm == Norm::batch ? cols : rows; }
  int64_t reduced() const { return norm == Norm::batch ? rows : cols; }
};

// The parameters of norm and activation. All but z may have the compute dtype where z has 16 bits.
struct NormTensors {
  at::Tensor z;                 // [..., cols]
  OptionalTensor weight, bias;  // [cols]
  OptionalTensor slope;         // [1] or [cols], prelu's
};

// Checks everything that can be checked without reading data; raises ValueError or TypeError.
NormActDropout check_norm_act_dropout(const NormTensors& tensors, const OptionalTensor& mean,
                                      const OptionalTensor& variance, const OptionalTensor& seed, std::string_view norm,
                                      std::string_view activation, double p, int64_t stream);
NormActDropout check_norm_act_dropout_backward(const at::Tensor& dy, const NormTensors& tensors, const at::Tensor& mean,
                                               const at::Tensor& inverse, const at::Tensor& bits, std::string_view norm,
                                               bool fixed, std::string_view activation, double p);

// Whether the backward pass reads z.
bool saves_input(std::string_view norm, std::string_view activation);

// y, and for batch statistics (not fixed ones) the mean and biased variance of each column; otherwise these are empty.
using NormResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
NormResult norm_act_dropout(const at::Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& slope,
                            const OptionalTensor& seed, std::string_view norm, double eps, std::string_view activation,
                            double negative_slope, double p, int64_t stream);

// The two halves, through the dispatcher. Forward: y; mean and inverse deviation, which backward needs, of each column
// (batch) or row (layer); the biased variance of each column, for running averages; and the live bits.
using NormForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
NormForwardResult norm_act_dropout_forward(const at::Tensor& z, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& mean,
                                           const OptionalTensor& variance, const OptionalTensor& slope,
                                           const OptionalTensor& seed, std::string_view norm, double eps,
                                           std::string_view activation, double negative_slope, double p, int64_t stream,
                                           bool save);
// dz, dweight, dbias, dslope
BackwardResult norm_act_dropout_backward(const at::Tensor& dy, const at::Tensor& z, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& slope,
                                         const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& bits,
                                         std::string_view norm, bool fixed, std::string_view activation,
                                         double negative_slope, double p, std::array<bool, 4> needs);

}  // namespace mlpkit
