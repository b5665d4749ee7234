// A guarded update that is decided on a device: what lasts from step to step stays there (ops). It exists in builds
// without CUDA too, where nothing can make one.
#pragma once
#include <memory>
#include <tuple>

#include "ops/guarded_update.h"

namespace mlpkit {

class DeviceUpdate {
 public:
  virtual ~DeviceUpdate() = default;
  // Queues a step and waits for nothing. gradients: by row, undefined where a row takes no part. rates: by group, its
  // learning rate as a float32 tensor of one number on the device, or undefined. The result: outcome and census, as in
  // mlpkit.ops.guarded_update. Raises ValueError or TypeError for tensors that do not fit.
  virtual std::tuple<at::Tensor, at::Tensor> run(const std::vector<at::Tensor>& gradients,
                                                 const std::vector<GuardedGroup>& groups,
                                                 const std::vector<at::Tensor>& rates,
                                                 const GuardedOptions& options) = 0;
  // float64: steps, skips, then of each of the last skips, the oldest overwritten: step, reason, norm, factor, row,
  // rows, scale, and the census of that row. Undefined before the first step.
  virtual at::Tensor log() const = 0;
  // float64 (rows, 4), as the op's `bounds`.
  virtual at::Tensor bounds() = 0;
  virtual std::vector<GuardedRow>& rows() = 0;
  virtual Optimizer kind() const = 0;
};

using MakeDeviceUpdate = std::unique_ptr<DeviceUpdate> (*)(Optimizer, std::vector<GuardedRow>);
// What makes one for CUDA tensors; nullptr in a build without CUDA.
MakeDeviceUpdate& device_update_maker();
// Raises NotImplementedError where there is none, or its kernels are not allowed (ops/cuda_kernels.h).
std::unique_ptr<DeviceUpdate> make_device_update(Optimizer kind, std::vector<GuardedRow> rows);

}  // namespace mlpkit
