// The part of mlpkit._C that guard.GradScaler stands on.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace mlpkit {

void bind_scaler(pybind11::module_& m);

}  // namespace mlpkit
