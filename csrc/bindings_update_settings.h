// What the updates of mlpkit._C read of a torch.optim.Optimizer: settings of its groups and the options of a step.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include "ops/guarded_update.h"

namespace mlpkit {

namespace py = pybind11;

at::Tensor tensor_or_none(const char* what, const py::handle& object);

// rate: gets a learning rate that lies on a device, which is not read; nullptr: it is.
GuardedGroup group_settings(PyObject* group, at::Tensor* rate);
// A group's list of parameters; nullptr where there is none.
PyObject* group_params(PyObject* group);

// Arguments as Python gives them to a step; those of a rule are growth, backoff, interval, floor and ceiling.
struct StepArguments {
  double clip;
  py::object scale, clean, found, rule;
  bool force, unscale, torch;
  GuardedOptions options(const py::list& groups) const;
};

}  // namespace mlpkit
