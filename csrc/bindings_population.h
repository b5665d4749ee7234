// The part of mlpkit._C that trains populations.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace mlpkit {

void bind_population(pybind11::module_& m);

}  // namespace mlpkit
