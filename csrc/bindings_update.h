// The part of mlpkit._C that updates the parameters of a torch.optim.Optimizer.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace mlpkit {

void bind_update(pybind11::module_& m);
void bind_host_update(pybind11::module_& m);  // its part for the CPU

}  // namespace mlpkit
