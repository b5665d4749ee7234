// What bindings.cpp takes from bindings_step.cpp.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace mlpkit {

void bind_step(py::module_& m);

}  // namespace mlpkit
