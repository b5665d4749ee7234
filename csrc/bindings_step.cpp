// The part of mlpkit._C that takes whole training steps: it holds what Python has proven about a model, a loss and an
// optimizer, and sees at each call, at the cost of some dictionary look-ups, whether that still holds.
#include "bindings_step.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "ops/mlp_step.h"

namespace mlpkit {
namespace {

PyObject* item(PyObject* dict, const py::str& key) { return PyDict_GetItem(dict, key.ptr()); }
bool empty(PyObject* dict) { return dict == nullptr || dict == Py_None || (PyDict_Check(dict) && !PyDict_Size(dict)); }

struct Names {
  py::str forward{"forward"}, modules{"_modules"}, parameters{"_parameters"}, training{"training"}, dropout{"dropout"},
      param_groups{"param_groups"}, params{"params"}, state{"state"}, betas{"betas"}, alpha{"alpha"},
      nesterov{"nesterov"}, lr{"lr"}, weight_decay{"weight_decay"}, momentum{"momentum"}, dampening{"dampening"},
      eps{"eps"}, layers{"layers"};
  std::vector<py::str> hooks{"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
  std::vector<py::str> step_hooks{"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"};
  std::vector<py::str> unusual{"amsgrad", "maximize", "centered", "differentiable", "capturable"};
};
// Never destroyed: the interpreter may be gone by then.
const Names& names() {
  static const Names* all = new Names();
  return *all;
}

// A module that is nothing but what its class says: no hook, no forward of its own.
struct Module {
  py::object module;
  PyTypeObject* type;
  py::dict dict;
  explicit Module(py::object of) : module(std::move(of)), type(Py_TYPE(module.ptr())), dict(module.attr("__dict__")) {}
  bool plain() const {
    if (Py_TYPE(module.ptr()) != type || PyDict_Contains(dict.ptr(), names().forward.ptr())) return false;
    for (const py::str& name : names().hooks)
      if (!empty(item(dict.ptr(), name))) return false;
    return true;
  }
};

// Entries of a dict that must be these very objects.
struct Entries {
  py::dict dict;
  std::vector<std::pair<py::str, py::object>> known;
  bool same() const {
    for (const auto& [name, value] : known)
      if (item(dict.ptr(), name) != value.ptr()) return false;
    return true;
  }
};

// A float32 tensor that lies on the CPU as it did.
struct Place {
  at::Tensor tensor;
  std::vector<int64_t> sizes;
  explicit Place(const at::Tensor& of) : tensor(of), sizes(of.sizes().vec()) {}
  bool same() const {
    return tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.sizes() == sizes &&
           tensor.is_contiguous();
  }
};

bool trained(PyObject* object) {
  const auto* variable = reinterpret_cast<THPVariable*>(object);
  return THPVariable_Unpack(object).requires_grad() && empty(variable->backward_hooks) &&
         empty(variable->post_accumulate_grad_hooks);
}

// Nobody watches operations or changes what they do.
bool undisturbed() {
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

std::optional<double> number(PyObject* object) {
  if (object == nullptr) return 0.0;
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_CheckExact(object) && !PyBool_Check(object)) return std::nullopt;  // Python decides what that means
  return PyLong_AsDouble(object);
}

class Settings {  // of one parameter group, within the bounds of mlpkit.guard.bounds
 public:
  explicit Settings(PyObject* group) : group_(group) {}
  std::optional<MlpStepGroup> read() {
    const Names& n = names();
    for (const py::str& name : n.unusual) {
      PyObject* value = item(group_, name);
      if (value != nullptr && value != Py_False && value != Py_None) return std::nullopt;
    }
    MlpStepGroup result{};
    result.lr = modest(item(group_, n.lr));
    result.weight_decay = modest(item(group_, n.weight_decay));
    result.momentum = modest(item(group_, n.momentum));
    result.dampening = modest(item(group_, n.dampening));
    result.eps = modest(item(group_, n.eps));
    if (item(group_, n.eps) != nullptr && !(result.eps >= 0x1p-40)) good_ = false;
    PyObject* betas = item(group_, n.betas);
    if (betas != nullptr && PyTuple_CheckExact(betas) && PyTuple_GET_SIZE(betas) == 2) {
      result.beta1 = beta(PyTuple_GET_ITEM(betas, 0));
      result.beta2 = beta(PyTuple_GET_ITEM(betas, 1));
    } else {
      good_ = good_ && betas == nullptr;
      result.beta2 = beta(item(group_, n.alpha));
    }
    PyObject* nesterov = item(group_, n.nesterov);
    result.nesterov = nesterov != nullptr && PyObject_IsTrue(nesterov) == 1;
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
  bool good_ = true;
};

// What a step was proven for. Objects are held, so that none can be replaced by another at the same address.
class WatchedStep {
 public:
  WatchedStep(py::object model, py::list layers, py::object optimizer, py::list global_hooks, bool bfloat16,
              const std::string& loss, bool mean, double delta, double label_smoothing, int64_t ignore_index,
              std::optional<at::Tensor> class_weights, const std::string& kind, const std::string& activation,
              double negative_slope, py::list entries, py::list also_plain, py::list also_same);

  // None: something is not as it was proven to be. False: nothing was changed, because something is not finite, too
  // large or out of range. Otherwise the loss and the norm of the gradients.
  py::object take(py::object inputs, py::object target, double clip_norm) {
    if (!same() || !fits(inputs.ptr(), target.ptr())) return py::none();
    return run(inputs, target, clip_norm);
  }
  // The same where Python has just proven everything anew.
  py::object take_proven(py::object inputs, py::object target, double clip_norm) {
    read_dropout();
    if (!read_groups()) return py::none();
    return run(inputs, target, clip_norm);
  }

 private:
  bool same();
  bool fits(PyObject* inputs, PyObject* target) const;
  bool read_dropout();
  bool read_groups();
  py::object run(const py::object& inputs, const py::object& target, double clip_norm);

  Module model_;
  py::dict layer_list_;  // ModuleList's modules
  std::vector<Module> layers_, also_plain_;
  std::vector<Entries> parameters_, states_, also_same_;
  std::vector<py::object> trained_;
  std::vector<Place> places_;
  py::dict optimizer_;
  py::object state_;
  std::vector<std::pair<py::object, py::object>> state_items_;
  std::vector<std::vector<py::object>> group_params_;
  std::vector<py::object> global_hooks_;
  std::vector<double> p_;
  std::vector<MlpStepGroup> groups_;
  bool by_class_;
  int64_t in_ = 0, out_ = 0;
  std::unique_ptr<MlpStep> step_;
};

Loss loss_of(const std::string& name) {
  if (name == "cross_entropy") return Loss::cross_entropy;
  if (name == "bce") return Loss::bce;
  if (name == "mse") return Loss::mse;
  if (name == "l1") return Loss::l1;
  if (name == "huber") return Loss::huber;
  if (name == "log_mse") return Loss::log_mse;
  throw py::value_error("mlp_step: loss is '" + name + "'; it must be cross_entropy, bce, mse, l1, huber or log_mse");
}

std::optional<at::Tensor> tensor_or_none(const py::handle& object) {
  if (object.is_none()) return std::nullopt;
  return THPVariable_Unpack(object.ptr());
}

// layers: of each module, its weight, bias and slope (or None). entries: of each parameter in that order, its group,
// its dictionary in the optimizer's state, and the names in it of the first and second moment and the step count (or
// None). also_plain: more modules that must stay plain; also_same: (dictionary, key) of more entries that must stay.
WatchedStep::WatchedStep(py::object model, py::list layers, py::object optimizer, py::list global_hooks, bool bfloat16,
                         const std::string& loss, bool mean, double delta, double label_smoothing, int64_t ignore_index,
                         std::optional<at::Tensor> class_weights, const std::string& kind,
                         const std::string& activation, double negative_slope, py::list entries, py::list also_plain,
                         py::list also_same)
    : model_(model), layer_list_(model.attr("layers").attr("_modules")), optimizer_(optimizer.attr("__dict__")) {
  std::vector<MlpStepLayer> tensors;
  for (const py::handle layer : layers) {
    const auto parts = layer.cast<py::tuple>();
    layers_.emplace_back(parts[0].cast<py::object>());
    Entries known{parts[0].attr("_parameters").cast<py::dict>(), {}};
    const char* name[] = {"weight", "bias", "slope"};
    for (int i = 0; i < 3; ++i) {
      if (i == 2 && parts[3].is_none()) continue;
      known.known.emplace_back(name[i], parts[i + 1].cast<py::object>());
      if (!parts[i + 1].is_none()) trained_.push_back(parts[i + 1].cast<py::object>());
    }
    parameters_.push_back(std::move(known));
    tensors.push_back({*tensor_or_none(parts[1]), tensor_or_none(parts[2]), tensor_or_none(parts[3])});
  }
  std::vector<MlpStepState> states;
  for (const py::handle entry : entries) {
    const auto parts = entry.cast<py::tuple>();
    MlpStepState state{parts[0].cast<int64_t>(), std::nullopt, std::nullopt, std::nullopt};
    std::optional<at::Tensor>* to[] = {&state.first, &state.second, &state.step};
    Entries known{parts[1].cast<py::dict>(), {}};
    for (int i = 0; i < 3; ++i) {
      if (parts[2 + i].is_none()) continue;
      const auto key = parts[2 + i].cast<py::str>();
      known.known.emplace_back(key, known.dict[key].cast<py::object>());
      *to[i] = tensor_or_none(known.dict[key]);
      places_.emplace_back(**to[i]);
    }
    states_.push_back(std::move(known));
    states.push_back(std::move(state));
  }
  for (const py::object& parameter : trained_) places_.emplace_back(THPVariable_Unpack(parameter.ptr()));
  for (const py::handle group : optimizer.attr("param_groups")) {
    std::vector<py::object> params;
    for (const py::handle parameter : group["params"]) params.push_back(parameter.cast<py::object>());
    group_params_.push_back(std::move(params));
  }
  state_ = optimizer.attr("state");
  for (const auto& [key, value] : state_.cast<py::dict>())
    state_items_.emplace_back(key.cast<py::object>(), value.cast<py::object>());
  for (const py::handle module : also_plain) also_plain_.emplace_back(module.cast<py::object>());
  for (const py::handle entry : also_same) {
    const auto parts = entry.cast<py::tuple>();
    const auto dict = parts[0].cast<py::dict>();
    const auto key = parts[1].cast<py::str>();
    also_same_.push_back({dict, {{key, dict[key].cast<py::object>()}}});
  }
  for (const py::handle hooks : global_hooks) global_hooks_.push_back(hooks.cast<py::object>());
  by_class_ = loss == "cross_entropy";
  in_ = tensors.front().weight.size(1);
  out_ = tensors.back().weight.size(0);
  step_ = std::make_unique<MlpStep>(
      std::move(tensors), bfloat16, activation, negative_slope,
      MlpStepLoss{loss_of(loss), mean, delta, label_smoothing, ignore_index, std::move(class_weights)}, kind,
      std::move(states));
}

bool WatchedStep::same() {
  if (!undisturbed() || !model_.plain()) return false;
  for (const py::object& hooks : global_hooks_)
    if (!empty(hooks.ptr())) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  size_t next = 0;
  while (PyDict_Next(layer_list_.ptr(), &position, &key, &value))
    if (next == layers_.size() || layers_[next++].module.ptr() != value) return false;
  if (next != layers_.size()) return false;
  for (const auto* modules : {&layers_, &also_plain_})
    for (const Module& module : *modules)
      if (!module.plain()) return false;
  for (const auto* list : {&parameters_, &states_, &also_same_})
    for (const Entries& entries : *list)
      if (!entries.same()) return false;
  for (const py::object& parameter : trained_)
    if (!trained(parameter.ptr())) return false;
  for (const Place& place : places_)
    if (!place.same()) return false;
  for (const py::str& name : names().step_hooks)
    if (!empty(item(optimizer_.ptr(), name))) return false;
  if (item(optimizer_.ptr(), names().state) != state_.ptr()) return false;
  position = 0;
  next = 0;
  while (PyDict_Next(state_.ptr(), &position, &key, &value)) {
    if (next == state_items_.size() || state_items_[next].first.ptr() != key ||
        state_items_[next].second.ptr() != value)
      return false;
    ++next;
  }
  if (next != state_items_.size()) return false;
  return read_dropout() && read_groups();
}

bool WatchedStep::fits(PyObject* inputs, PyObject* target) const {
  for (PyObject* object : {inputs, target})
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(THPVariableClass)) return false;
  const at::Tensor &x = THPVariable_Unpack(inputs), &t = THPVariable_Unpack(target);
  for (const at::Tensor& tensor : {x, t})
    if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.requires_grad()) return false;
  if (x.scalar_type() != at::kFloat || x.dim() != 2 || x.size(1) != in_ || x.size(0) == 0) return false;
  if (by_class_) return t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == x.size(0);
  return t.scalar_type() == at::kFloat && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == out_;
}

bool WatchedStep::read_dropout() {
  p_.clear();
  for (size_t i = 0; i + 1 < layers_.size(); ++i) {
    const std::optional<double> p = number(item(layers_[i].dict.ptr(), names().dropout));
    if (!p) return false;
    p_.push_back(item(layers_[i].dict.ptr(), names().training) == Py_True ? *p : 0.0);
  }
  return true;
}

bool WatchedStep::read_groups() {
  PyObject* groups = item(optimizer_.ptr(), names().param_groups);
  if (groups == nullptr || !PyList_Check(groups) ||
      PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(group_params_.size()))
    return false;
  groups_.clear();
  for (size_t i = 0; i < group_params_.size(); ++i) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    PyObject* params = item(group, names().params);
    const std::vector<py::object>& known = group_params_[i];
    if (params == nullptr || !PyList_Check(params) || PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(known.size()))
      return false;
    for (size_t j = 0; j < known.size(); ++j)
      if (PyList_GET_ITEM(params, j) != known[j].ptr()) return false;
    const std::optional<MlpStepGroup> settings = Settings(group).read();
    if (!settings) return false;
    groups_.push_back(*settings);
  }
  return true;
}

py::object WatchedStep::run(const py::object& inputs, const py::object& target, double clip_norm) {
  MlpStepOutcome outcome{};
  {
    const at::Tensor x = THPVariable_Unpack(inputs.ptr()), t = THPVariable_Unpack(target.ptr());
    const py::gil_scoped_release release;
    const at::AutoDispatchBelowADInplaceOrView below;
    outcome = step_->take(x, t, p_, clip_norm, groups_);
  }
  if (!outcome.taken) return py::bool_(false);
  for (const py::object& parameter : trained_) {
    const at::Tensor& tensor = THPVariable_Unpack(parameter.ptr());
    if (tensor.grad().defined()) tensor.mutable_grad().reset();
  }
  return py::make_tuple(outcome.loss, outcome.norm);
}

}  // namespace

void bind_step(py::module_& m) {
  py::class_<WatchedStep>(m, "MlpStep")
      .def(py::init<py::object, py::list, py::object, py::list, bool, const std::string&, bool, double, double, int64_t,
                    std::optional<at::Tensor>, const std::string&, const std::string&, double, py::list, py::list,
                    py::list>(),
           py::arg("model"), py::arg("layers"), py::arg("optimizer"), py::arg("global_hooks"), py::arg("bfloat16"),
           py::arg("loss"), py::arg("mean"), py::arg("delta"), py::arg("label_smoothing"), py::arg("ignore_index"),
           py::arg("class_weights"), py::arg("kind"), py::arg("activation"), py::arg("negative_slope"),
           py::arg("entries"), py::arg("also_plain"), py::arg("also_same"))
      .def("take", &WatchedStep::take, py::arg("inputs"), py::arg("target"), py::arg("clip_norm"))
      .def("take_proven", &WatchedStep::take_proven, py::arg("inputs"), py::arg("target"), py::arg("clip_norm"));
}

}  // namespace mlpkit
