// mlp_norm: a whole network whose hidden layers are linear, norm, activation and dropout (ops).
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace mlpkit {

// y, and mean and biased variance of every hidden layer's batch in turn, [2, sum of hidden widths]; empty without batch
// statistics. means and variances: given ones, in place of the batch's.
std::tuple<at::Tensor, at::Tensor> mlp_norm(
    const at::Tensor& x, at::TensorList weights, const c10::List<std::optional<at::Tensor>>& biases,
    const c10::List<std::optional<at::Tensor>>& slopes, const c10::List<std::optional<at::Tensor>>& norm_weights,
    const c10::List<std::optional<at::Tensor>>& norm_biases, const c10::List<std::optional<at::Tensor>>& means,
    const c10::List<std::optional<at::Tensor>>& variances, const std::optional<at::Tensor>& seed, std::string_view norm,
    double eps, std::string_view activation, double negative_slope, at::ArrayRef<double> p);

}  // namespace mlpkit
