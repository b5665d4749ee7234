// The part of mlpkit._C that guard.GradScaler stands on: it goes through an optimizer's own lists, and keeps nothing.
#include "bindings_scaler.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bindings_watch.h"
#include "ops/observed_key.h"
#include "ops/unscale.h"

namespace mlpkit {
namespace {

struct ScalerNames {
  py::str params{"params"}, grad_scale{"grad_scale"}, found_inf{"found_inf"}, step{"step"}, lr{"lr"},
      weight_decay{"weight_decay"}, betas{"betas"}, wrapped{"_wrapped_by_lr_sched"};
};
// Never destroyed: the interpreter may be gone by then.
const ScalerNames& scaler_names() {
  static const ScalerNames* all = new ScalerNames();
  return *all;
}

bool watched() { return c10::impl::TorchDispatchModeTLS::any_modes_set() || observed(); }

// Of all parameters in their groups' order, undefined where there is none; nothing where an object is no tensor.
std::optional<std::vector<at::Tensor>> gradients_of(const py::list& groups) {
  std::vector<at::Tensor> found;
  for (const py::handle group : groups) {
    PyObject* params = PyDict_Check(group.ptr()) ? item(group.ptr(), scaler_names().params) : nullptr;
    if (!params || !PyList_Check(params)) return std::nullopt;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* parameter = PyList_GET_ITEM(params, i);
      if (!THPVariable_Check(parameter)) return std::nullopt;
      found.push_back(THPVariable_Unpack(parameter).grad());
    }
  }
  return found;
}

// One number for each tensor: `largest`, which lacks those that are undefined, NaN for these.
at::Tensor absmax_of(const std::vector<at::Tensor>& all, const std::vector<double>& largest) {
  bool wide = false;
  for (const at::Tensor& tensor : all) wide = wide || (tensor.defined() && tensor.scalar_type() == at::kDouble);
  at::Tensor result = at::empty({static_cast<int64_t>(all.size())}, wide ? at::kDouble : at::kFloat);
  size_t next = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const double value = all[i].defined() ? largest[next++] : std::numeric_limits<double>::quiet_NaN();
    if (wide)
      result.mutable_data_ptr<double>()[i] = value;
    else
      result.mutable_data_ptr<float>()[i] = static_cast<float>(value);
  }
  return result;
}

// (found, absmax, largest of it): a float32 flag as torch's scaler keeps it; what each gradient held: Inf where Inf or
// NaN, NaN where there is none. None: these gradients are for torch's own scaler to take or to refuse.
py::object unscale_gradients(const py::list& groups, const at::Tensor& scale) {
  if (watched() || !scale.is_cpu() || scale.scalar_type() != at::kFloat || scale.numel() != 1) return py::none();
  const std::optional<std::vector<at::Tensor>> all = gradients_of(groups);
  if (!all) return py::none();
  std::vector<at::Tensor> given;
  for (const at::Tensor& gradient : *all) {
    if (!gradient.defined()) continue;
    if (!can_unscale(gradient)) return py::none();
    given.push_back(gradient);
  }
  if (given.empty()) return py::none();
  const float factor = static_cast<float>(1 / static_cast<double>(*scale.const_data_ptr<float>()));
  at::Tensor found, absmax;
  double most = 0;
  {
    const py::gil_scoped_release release;
    const at::NoGradGuard no_grad;
    const std::vector<double> largest = unscale(given, factor);
    most = *std::max_element(largest.begin(), largest.end());
    absmax = absmax_of(*all, largest);
    found = at::full({}, std::isinf(most) ? 1.0 : 0.0, at::kFloat);
  }
  return py::make_tuple(found, absmax, most);
}

// As unscale_gradients sees them, of tensors on the CPU, None left out: nothing is written.
at::Tensor absmax(const std::vector<std::optional<at::Tensor>>& tensors) {
  const py::gil_scoped_release release;
  std::vector<at::Tensor> all, given;
  for (const std::optional<at::Tensor>& tensor : tensors) {
    all.push_back(tensor ? tensor->detach().contiguous() : at::Tensor());
    if (tensor) given.push_back(all.back());
  }
  return absmax_of(all, unscale(given, 1));
}

bool none(PyObject* object) { return object == nullptr || object == Py_None; }
bool plain_number(PyObject* object) { return object && (PyFloat_Check(object) || PyLong_Check(object)); }

bool plain_group(PyObject* group) {
  const ScalerNames& n = scaler_names();
  // A rate that is a tensor takes part in torch's arithmetic as one.
  if (!plain_number(item(group, n.lr)) || !plain_number(item(group, n.weight_decay))) return false;
  PyObject* betas = item(group, n.betas);
  if (!betas) return true;
  if (!PyTuple_Check(betas) && !PyList_Check(betas)) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(betas); ++i)
    if (THPVariable_Check(PySequence_Fast_GET_ITEM(betas, i))) return false;
  return true;
}

// Whether nothing of this moment but Python's modes for functions asks that a step be made by the optimizer in person.
// attributes: its __dict__.
bool as_torch_now(const py::dict& attributes, const py::list& groups) {
  const ScalerNames& n = scaler_names();
  PyObject* own = attributes.ptr();
  if (!none(item(own, n.grad_scale)) || !none(item(own, n.found_inf)) || watched()) return false;
  PyObject* step = item(own, n.step);
  if (step && !py::getattr(step, n.wrapped, py::bool_(false)).cast<bool>()) return false;
  for (const py::handle group : groups)
    if (!PyDict_Check(group.ptr()) || !plain_group(group.ptr())) return false;
  return true;
}

}  // namespace

void bind_scaler(py::module_& m) {
  m.def("unscale", &unscale_gradients, py::arg("groups"), py::arg("scale"));
  m.def("absmax", &absmax, py::arg("tensors"));
  m.def("as_torch_now", &as_torch_now, py::arg("attributes"), py::arg("groups"));
}

}  // namespace mlpkit
