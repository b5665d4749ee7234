// A whole network of linear_act_dropout layers, the last one linear (ops).
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <string_view>

namespace mlpkit {

// Through the dispatcher: what pybind11 exposes as the quick eager path. One bias and slope (or none) for each weight,
// one p for each hidden layer; layer i draws its mask from stream i of the one seed.
at::Tensor mlp(const at::Tensor& x, at::TensorList weights, const c10::List<std::optional<at::Tensor>>& biases,
               const c10::List<std::optional<at::Tensor>>& slopes, const std::optional<at::Tensor>& seed,
               std::string_view activation, double negative_slope, at::ArrayRef<double> p);

}  // namespace mlpkit
