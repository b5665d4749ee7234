// Whether what a native step was proven for is still so. Part of the module mlpkit._C.
#include "bindings_watch.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>

#include "bindings_follow.h"
#include "ops/observed_key.h"

namespace mlpkit {

// Never destroyed: the interpreter may be gone by then.
const Names& names() {
  static const Names* all = new Names();
  return *all;
}

PyObject* item(PyObject* dict, const py::str& key) { return PyDict_GetItem(dict, key.ptr()); }
bool empty(PyObject* dict) { return dict == nullptr || dict == Py_None || (PyDict_Check(dict) && !PyDict_Size(dict)); }

std::optional<double> number(PyObject* object) {
  if (object == nullptr) return 0.0;
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_Check(object)) return std::nullopt;  // Python decides what that means
  const double value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {  // beyond double
    PyErr_Clear();
    return std::nullopt;
  }
  return value;
}

Module::Module(py::object of) : module(std::move(of)), type(Py_TYPE(module.ptr())), dict(module.attr("__dict__")) {}

bool Module::plain() const {
  if (Py_TYPE(module.ptr()) != type || PyDict_Contains(dict.ptr(), names().forward.ptr())) return false;
  for (const py::str& name : names().hooks)
    if (!empty(item(dict.ptr(), name))) return false;
  return true;
}

bool Entries::same() const {
  for (const auto& [name, value] : known)
    if (item(dict.ptr(), name) != value.ptr()) return false;
  return true;
}

Items::Items(py::dict of) : dict(std::move(of)) {
  for (const auto& [key, value] : dict) known.emplace_back(key.cast<py::object>(), value.cast<py::object>());
}

bool Items::same() const {
  if (PyDict_Size(dict.ptr()) != static_cast<Py_ssize_t>(known.size())) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (size_t i = 0; PyDict_Next(dict.ptr(), &position, &key, &value); ++i)
    if (i == known.size() || known[i].first.ptr() != key || known[i].second.ptr() != value) return false;
  return true;
}

Place::Place(py::object of) : object(std::move(of)) {
  const at::Tensor& known = THPVariable_Unpack(object.ptr());
  tensor = known.unsafeGetTensorImpl();
  dtype = known.scalar_type();
  sizes = known.sizes().vec();
}

bool Place::same() const {
  const at::Tensor& now = THPVariable_Unpack(object.ptr());
  return now.unsafeGetTensorImpl() == tensor && now.scalar_type() == dtype && now.device().is_cpu() &&
         now.sizes() == sizes && now.is_contiguous() && !now.is_inference() && !now.is_neg() && !now._is_zerotensor();
}

bool trained(PyObject* object) {
  const auto* variable = reinterpret_cast<THPVariable*>(object);
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.requires_grad() || !empty(variable->backward_hooks) || !empty(variable->post_accumulate_grad_hooks))
    return false;
  const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(tensor);
  return !accumulator || (accumulator->pre_hooks().empty() && accumulator->post_hooks().empty());
}

bool undisturbed() {
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !observed() && !outputs_followed() && at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

namespace {

bool truth(PyObject* object) {
  if (object == nullptr || object == Py_False || object == Py_None) return false;
  const int value = PyObject_IsTrue(object);
  if (value < 0) PyErr_Clear();
  return value != 0;
}

class Settings {  // of one parameter group, within the bounds of mlpkit.guard.bounds
 public:
  Settings(PyObject* group, bool decoupled) : group_(group), decoupled_(decoupled) {}
  std::optional<MlpStepGroup> read() {
    const Names& n = names();
    for (const py::str& name : n.unusual)
      if (truth(item(group_, name))) return std::nullopt;
    PyObject* decoupled = item(group_, n.decoupled_weight_decay);
    if (decoupled != nullptr && truth(decoupled) != decoupled_) return std::nullopt;
    MlpStepGroup result{};
    result.lr = modest(item(group_, n.lr));
    result.weight_decay = modest(item(group_, n.weight_decay));
    result.momentum = modest(item(group_, n.momentum));
    result.dampening = modest(item(group_, n.dampening));
    result.eps = modest(item(group_, n.eps));
    if (item(group_, n.eps) != nullptr && !(result.eps >= 0x1p-40)) good_ = false;
    PyObject* betas = item(group_, n.betas);
    if (betas != nullptr && (PyTuple_Check(betas) || PyList_Check(betas)) && PySequence_Fast_GET_SIZE(betas) == 2) {
      result.beta1 = beta(PySequence_Fast_GET_ITEM(betas, 0));
      result.beta2 = beta(PySequence_Fast_GET_ITEM(betas, 1));
    } else {
      good_ = good_ && betas == nullptr;
      result.beta2 = beta(item(group_, n.alpha));
    }
    result.nesterov = truth(item(group_, n.nesterov));
    return good_ ? std::optional(result) : std::nullopt;
  }

 private:
  double modest(PyObject* object) {
    const std::optional<double> value = number(object);
    good_ = good_ && value && std::abs(*value) <= 0x1p10;
    return value.value_or(0.0);
  }
  double beta(PyObject* object) {
    const std::optional<double> value = number(object);
    good_ = good_ && value && *value >= 0 && *value <= 1 - 0x1p-20;
    return value.value_or(0.0);
  }
  PyObject* group_;
  bool decoupled_, good_ = true;
};

}  // namespace

std::optional<MlpStepGroup> settings_of(PyObject* group, bool decoupled) { return Settings(group, decoupled).read(); }

}  // namespace mlpkit
