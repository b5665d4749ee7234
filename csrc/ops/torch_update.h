// One step of torch.optim's optimizers by the operations that they are made of, in their order and by the library's own
// kernels, so that every bit is theirs (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "ops/guarded_update.h"

namespace mlpkit {

// gradient *= factor, rounded as float32 (float64 for that) is.
void scale_gradient(const at::Tensor& gradient, double factor);

// rows: of one group, of one dtype where `by_fused_kernels`, steps and momentum buffers as before the step (counts
// already raised); gradients of the same layout, which stay as they are; steps: the raised counts.
// kind: sgd, adam, adamw or rmsprop.
void torch_update(Optimizer kind, bool by_fused_kernels, const GuardedGroup& group,
                  const std::vector<const GuardedRow*>& rows, const std::vector<at::Tensor>& gradients,
                  const std::vector<double>& steps);

}  // namespace mlpkit
