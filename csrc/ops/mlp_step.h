// A whole training step of an MLP in one call: forward, loss, backward, inspection, then the update or nothing (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "core/loss.h"
#include "core/norm.h"
#include "core/optimizer.h"

namespace mlpkit {

// Parameters and state are borrowed: between steps nothing here counts as a reference to a tensor, which would keep
// torch.utils.swap_tensors from its work. nullptr where there is none.
using BorrowedTensor = c10::TensorImpl*;

struct MlpStepNorm {  // of a hidden layer
  Norm kind = Norm::none;
  double eps = 0.0, momentum = 0.0;
  bool frozen = false;  // batch: the running averages take the place of the batch's
  BorrowedTensor weight = nullptr, bias = nullptr, running_mean = nullptr, running_var = nullptr;
  BorrowedTensor batches = nullptr;  // int64: how many have been seen
};

struct MlpStepLayer {
  BorrowedTensor weight;  // [out, in]
  BorrowedTensor bias, slope;
  MlpStepNorm norm;
};

struct MlpStepLoss {
  Loss kind;
  bool mean;  // otherwise the sum
  double delta = 1.0, label_smoothing = 0.0;
  int64_t ignore_index = -100;
  BorrowedTensor class_weights = nullptr;
};

// A parameter's place in the optimizer: its group and its state as torch.optim keeps it.
struct MlpStepState {
  int64_t group;
  BorrowedTensor first = nullptr, second = nullptr, step = nullptr;
};

struct MlpStepGroup {
  double lr, weight_decay, momentum, dampening, beta1, beta2, eps;
  bool nesterov;
};

Optimizer optimizer_from_name(const std::string& name);

struct MlpStepOutcome {
  bool taken;  // false: nothing was changed, because something is not finite, too large to vouch for, or out of range
  double loss, norm;
};

// Parameters, gradients and state are float32 on the CPU; precision bf16 or fp16: inputs, weights, outputs of hidden
// layers and what flows back are rounded to that before they are multiplied, as under autocast. Parameters count as
// weight, bias, slope of the first layer, and so on, absent ones left out. What the caller vouches for: contiguous
// tensors of the right dtype and shape that live, all of them trained.
class MlpStep {
 public:
  MlpStep(std::vector<MlpStepLayer> layers, const std::string& precision, const std::string& activation,
          double negative_slope, MlpStepLoss loss, const std::string& optimizer, std::vector<MlpStepState> states);
  ~MlpStep();

  // x: [rows, in]; target: int64 [rows] for cross_entropy, otherwise float32 [rows, out]; p: one for each hidden layer;
  // clip_norm 0 means none. draws: one seed is drawn from torch's generator, which is put back when the step is
  // not taken. scale: what flows back is multiplied by, and the gradients are divided by; norm is of the latter.
  MlpStepOutcome take(const at::Tensor& x, const at::Tensor& target, const std::vector<double>& p, bool draws,
                      double clip_norm, double scale, const std::vector<MlpStepGroup>& groups);

 private:
  struct Work;
  std::unique_ptr<Work> work_;
};

}  // namespace mlpkit
