// The part of mlpkit._C that updates the parameters of a torch.optim.Optimizer.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace mlpkit {

void bind_update(pybind11::module_& m);

}  // namespace mlpkit
