// A whole training step of an MLP in one call (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace mlpkit {

struct MlpStep {         // float32 on the CPU throughout; layers as in mlp
  at::Tensor x, target;  // x: [rows, in_features]; target: int64 [rows] for cross_entropy, otherwise as the output
  std::vector<at::Tensor> weights;
  std::vector<std::optional<at::Tensor>> biases;
  std::optional<at::Tensor> seed;
  std::string activation;
  double negative_slope;
  std::vector<double> p;
  std::string loss;       // cross_entropy, bce, mse, l1 or huber
  double clip_norm;       // 0: no clipping
  std::string optimizer;  // sgd, adam, adamw or rmsprop
  // For each parameter (weight, bias, weight, bias, ...; absent biases left out): its group, or -1 where it is not
  // trained, and its state as torch.optim keeps it.
  std::vector<int64_t> group_of;
  std::vector<std::optional<at::Tensor>> firsts, seconds, steps;
  // For each group: lr, weight_decay, momentum, dampening, nesterov, beta1, beta2, eps.
  std::vector<std::vector<double>> groups;
};

struct MlpStepOutcome {
  bool taken;  // false: nothing was changed, because something is not finite, too large to vouch for, or out of range
  double loss, norm;
};

MlpStepOutcome mlp_step(const MlpStep&);

}  // namespace mlpkit
