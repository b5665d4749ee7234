// Which guarded update a device has (ops).
#include "ops/guarded_update_device.h"

#include <c10/util/Exception.h>

#include "ops/cuda_kernels.h"

namespace mlpkit {

MakeDeviceUpdate& device_update_maker() {
  static MakeDeviceUpdate maker = nullptr;
  return maker;
}

std::unique_ptr<DeviceUpdate> make_device_update(Optimizer kind, std::vector<GuardedRow> rows) {
  TORCH_CHECK_NOT_IMPLEMENTED(device_update_maker() != nullptr,
                              "guarded_update: parameters are on a CUDA device, and mlpkit was built without CUDA");
  TORCH_CHECK_NOT_IMPLEMENTED(cuda_kernels() == CudaKernels::all,
                              "guarded_update: the CUDA kernels wait for their proof on a device; "
                              "MLPKIT_CUDA_KERNELS=all takes them");
  return device_update_maker()(kind, std::move(rows));
}

}  // namespace mlpkit
