// What a native step was proven for, held as Python's own objects, and whether it is still so: dictionary look-ups, no
// Python code. Part of the module mlpkit._C.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

#include "ops/mlp_step.h"

namespace mlpkit {

struct Names {
  py::str forward{"forward"}, training{"training"}, param_groups{"param_groups"}, params{"params"}, state{"state"},
      betas{"betas"}, alpha{"alpha"}, nesterov{"nesterov"}, lr{"lr"}, weight_decay{"weight_decay"},
      momentum{"momentum"}, dampening{"dampening"}, eps{"eps"}, decoupled_weight_decay{"decoupled_weight_decay"},
      step{"step"};
  std::vector<py::str> hooks{"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
  std::vector<py::str> step_hooks{"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"};
  std::vector<py::str> unusual{"amsgrad", "maximize", "centered", "differentiable", "capturable"};
};
const Names& names();

// Borrowed; nullptr where there is none.
PyObject* item(PyObject* dict, const py::str& key);
// Whether an object is no dictionary, or an empty one.
bool empty(PyObject* dict);
// A float or an int as it is; nothing where Python must decide what it means. Absent is 0.
std::optional<double> number(PyObject* object);

// A module that is nothing but what its class says: no hook, no forward of its own.
struct Module {
  py::object module;
  PyTypeObject* type;
  py::dict dict;
  explicit Module(py::object of);
  bool plain() const;
};

// Entries of a dict that must be these very objects.
struct Entries {
  py::dict dict;
  std::vector<std::pair<py::str, py::object>> known;
  bool same() const;
};

// A dict that must hold these very items, in this order.
struct Items {
  py::dict dict;
  std::vector<std::pair<py::object, py::object>> known;
  explicit Items(py::dict of);
  bool same() const;
};

// A tensor that lies on the CPU as it did, and is still the one behind Python's object: torch.utils.swap_tensors puts
// another one there. Only the object is held.
struct Place {
  py::object object;
  at::TensorImpl* tensor;
  at::ScalarType dtype;
  std::vector<int64_t> sizes;
  explicit Place(py::object of);
  bool same() const;
};

// Whether a parameter is trained, and nobody is told of its gradient, which the native step never makes a tensor of.
bool trained(PyObject* parameter);
// Whether nobody watches operations or changes what they do.
bool undisturbed();
// A parameter group's settings where they lie within the bounds of mlpkit.guard.bounds. decoupled: as AdamW decays.
std::optional<MlpStepGroup> settings_of(PyObject* group, bool decoupled);

}  // namespace mlpkit
