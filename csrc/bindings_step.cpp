// The part of mlpkit._C that takes whole training steps: it holds what Python has proven about a model, a loss and an
// optimizer, and takes a step where that still holds.
#include "bindings_step.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>

#include "bindings_watch.h"
#include "ops/mlp_step.h"
#include "ops/observed_key.h"

namespace mlpkit {
namespace {

struct Flag {  // true while it lives
  explicit Flag(bool& flag) : flag(flag) { flag = true; }
  ~Flag() { flag = false; }
  Flag(const Flag&) = delete;
  Flag& operator=(const Flag&) = delete;
  bool& flag;
};

struct References {  // to the tensors of places, while it lives
  References(std::vector<at::Tensor>& memory, const std::vector<Place>& places) : memory(memory) {
    for (const Place& place : places) memory.push_back(THPVariable_Unpack(place.object.ptr()));
  }
  ~References() { memory.clear(); }
  References(const References&) = delete;
  References& operator=(const References&) = delete;
  std::vector<at::Tensor>& memory;
};

// What is watched, as Python names it.
struct Watched {
  py::list modules;    // that must stay plain
  py::list dicts;      // that must keep all their items
  py::list entries;    // (dict, key) that must keep their value
  py::list rates;      // of hidden layers: (the dict of the module that has it, the name of p in it)
  py::object drawing;  // dict of the module whose `training` says whether a seed is drawn; None: each rate's own
  py::list hooks;      // dicts that must stay empty
};

// What a step was proven for. Objects are held, so that none can be replaced by another at the same address.
class WatchedStep {
 public:
  WatchedStep(const py::list& layers, const py::object& optimizer, const py::list& states, const Watched& watched,
              const std::string& precision, const std::string& activation, double negative_slope, MlpStepLoss loss,
              const py::object& class_weights, const std::string& kind);

  // None: something is not as it was proven to be. False: nothing was changed, because something is not finite, too
  // large or out of range. Otherwise the loss and the norm of the gradients.
  py::object take(py::object inputs, py::object target, double clip_norm, double scale) {
    if (busy_ || !same() || !fits(inputs.ptr(), target.ptr())) return py::none();
    return run(inputs, target, clip_norm, scale);
  }
  // The same where Python has just proven everything anew.
  py::object take_proven(py::object inputs, py::object target, double clip_norm, double scale) {
    const auto holds = [](const py::object& parameter) { return trained(parameter.ptr()); };
    if (busy_ || !same_places() || !read_dropout() || !read_groups() ||
        !std::all_of(trained_.begin(), trained_.end(), holds))
      return py::none();
    return run(inputs, target, clip_norm, scale);
  }

  // For the garbage collector: a model may hold the step that watches it.
  template <class Visit>
  int each_object(const Visit& visit) const;
  void forget();

 private:
  BorrowedTensor borrow(const py::handle& object);
  MlpStepNorm norm_of(const py::handle& object);
  bool same();
  bool same_places() const;
  bool fits(PyObject* inputs, PyObject* target) const;
  bool read_dropout();
  bool read_groups();
  py::object run(const py::object& inputs, const py::object& target, double clip_norm, double scale);

  std::vector<Module> modules_;
  std::vector<Items> items_;
  std::vector<Entries> entries_;
  std::vector<std::pair<py::dict, py::str>> rates_;
  std::vector<py::object> hooks_, trained_;
  std::vector<Place> places_;
  std::vector<at::Tensor> alive_;  // of places, during a step
  py::dict optimizer_;
  py::object state_;
  std::vector<std::vector<py::object>> group_params_;
  py::object drawing_, own_step_;
  std::vector<double> p_;
  std::vector<MlpStepGroup> groups_;
  std::vector<bool> has_first_;  // of each group: whether its parameters have a first moment
  Optimizer kind_;
  bool by_class_, draws_ = false;
  bool busy_ = false;  // another thread is in a step of this object, outside the interpreter's lock
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

// What lies behind a tensor's object, which is held as long as the step may be taken; None is nullptr.
BorrowedTensor WatchedStep::borrow(const py::handle& object) {
  if (object.is_none()) return nullptr;
  const BorrowedTensor tensor = THPVariable_Unpack(object.ptr()).unsafeGetTensorImpl();
  const auto known = [&](const Place& place) { return place.tensor == tensor; };
  if (std::none_of(places_.begin(), places_.end(), known))
    places_.emplace_back(py::reinterpret_borrow<py::object>(object));
  return tensor;
}

// (kind, eps, momentum, frozen, weight, bias, running mean, running variance, batches)
MlpStepNorm WatchedStep::norm_of(const py::handle& object) {
  MlpStepNorm norm;
  if (object.is_none()) return norm;
  const auto parts = object.cast<py::tuple>();
  norm.kind = parts[0].cast<std::string>() == "batch" ? Norm::batch : Norm::layer;
  norm.eps = parts[1].cast<double>();
  norm.momentum = parts[2].cast<double>();
  norm.frozen = parts[3].cast<bool>();
  BorrowedTensor* to[] = {&norm.weight, &norm.bias, &norm.running_mean, &norm.running_var, &norm.batches};
  for (size_t i = 0; i < 5; ++i) *to[i] = borrow(parts[4 + i]);
  return norm;
}

// layers: (weight, bias, slope, norm), the last three may be None. states: of each parameter in the order of MlpStep,
// its group, its dictionary in the optimizer's state, and the names in it of the first and second moment and the step
// count (or None).
WatchedStep::WatchedStep(const py::list& layers, const py::object& optimizer, const py::list& states,
                         const Watched& watched, const std::string& precision, const std::string& activation,
                         double negative_slope, MlpStepLoss loss, const py::object& class_weights,
                         const std::string& kind)
    : optimizer_(optimizer.attr("__dict__")),
      state_(optimizer.attr("state")),
      drawing_(watched.drawing),
      kind_(optimizer_from_name(kind)) {
  if (PyObject* own = item(optimizer_.ptr(), names().step)) own_step_ = py::reinterpret_borrow<py::object>(own);
  for (const py::handle module : watched.modules) modules_.emplace_back(module.cast<py::object>());
  for (const py::handle dict : watched.dicts) items_.emplace_back(dict.cast<py::dict>());
  items_.emplace_back(state_.cast<py::dict>());
  for (const py::handle entry : watched.entries) {
    const auto [dict, key] = entry.cast<std::pair<py::dict, py::str>>();
    entries_.push_back({dict, {{key, dict[key].cast<py::object>()}}});
  }
  for (const py::handle rate : watched.rates) rates_.push_back(rate.cast<std::pair<py::dict, py::str>>());
  for (const py::handle hooks : watched.hooks) hooks_.push_back(hooks.cast<py::object>());
  std::vector<MlpStepLayer> tensors;
  for (const py::handle layer : layers) {
    const auto parts = layer.cast<py::tuple>();
    tensors.push_back({borrow(parts[0]), borrow(parts[1]), borrow(parts[2]), norm_of(parts[3])});
  }
  std::vector<MlpStepState> known_states;
  has_first_.resize(py::len(optimizer.attr("param_groups")));
  for (const py::handle entry : states) {
    const auto parts = entry.cast<py::tuple>();
    MlpStepState state{parts[0].cast<int64_t>()};
    BorrowedTensor* to[] = {&state.first, &state.second, &state.step};
    Entries known{parts[1].cast<py::dict>(), {}};
    for (int i = 0; i < 3; ++i) {
      if (parts[2 + i].is_none()) continue;
      const auto key = parts[2 + i].cast<py::str>();
      known.known.emplace_back(key, known.dict[key].cast<py::object>());
      *to[i] = borrow(known.dict[key]);
    }
    if (state.first) has_first_[state.group] = true;
    entries_.push_back(std::move(known));
    known_states.push_back(std::move(state));
  }
  for (const py::handle group : optimizer.attr("param_groups")) {
    std::vector<py::object>& params = group_params_.emplace_back();
    for (const py::handle parameter : group["params"]) {
      params.push_back(parameter.cast<py::object>());
      trained_.push_back(params.back());
      borrow(parameter);
    }
  }
  by_class_ = loss.kind == Loss::cross_entropy;
  loss.class_weights = borrow(class_weights);
  in_ = tensors.front().weight->size(1);
  out_ = tensors.back().weight->size(0);
  step_ = std::make_unique<MlpStep>(std::move(tensors), precision, activation, negative_slope, loss, kind,
                                    std::move(known_states));
}

bool WatchedStep::same() {
  if (!undisturbed()) return false;
  const auto all = [](const auto& list, const auto& holds) { return std::all_of(list.begin(), list.end(), holds); };
  return all(hooks_, [](const py::object& dict) { return empty(dict.ptr()); }) &&
         all(names().step_hooks, [&](const py::str& name) { return empty(item(optimizer_.ptr(), name)); }) &&
         item(optimizer_.ptr(), names().state) == state_.ptr() &&
         item(optimizer_.ptr(), names().step) == own_step_.ptr() &&
         all(modules_, [](const Module& module) { return module.plain(); }) &&
         all(items_, [](const Items& items) { return items.same(); }) &&
         all(entries_, [](const Entries& entries) { return entries.same(); }) &&
         all(trained_, [](const py::object& parameter) { return trained(parameter.ptr()); }) && same_places() &&
         read_dropout() && read_groups();
}

bool WatchedStep::same_places() const {
  return std::all_of(places_.begin(), places_.end(), [](const Place& place) { return place.same(); });
}

// Calls visit(object) for every object that is held, until one call returns something else than 0.
template <class Visit>
int WatchedStep::each_object(const Visit& visit) const {
  int result = 0;
  const auto see = [&](const py::handle& object) {
    if (result == 0 && object) result = visit(object.ptr());
  };
  for (const Module& module : modules_) (see(module.module), see(module.dict));
  for (const Items& items : items_) {
    see(items.dict);
    for (const auto& [key, value] : items.known) (see(key), see(value));
  }
  for (const Entries& entries : entries_) {
    see(entries.dict);
    for (const auto& [name, value] : entries.known) see(value);
  }
  for (const auto& [dict, name] : rates_) see(dict);
  for (const Place& place : places_) see(place.object);
  for (const auto* list : {&hooks_, &trained_})
    for (const py::object& object : *list) see(object);
  for (const auto& params : group_params_)
    for (const py::object& parameter : params) see(parameter);
  for (const py::object* object : {&state_, &drawing_, &own_step_}) see(*object);
  see(optimizer_);
  return result;
}

// Lets go of every object; no step can be taken any more.
void WatchedStep::forget() {
  busy_ = true;
  // What dies may look at this object, so it dies when nothing is held here.
  const auto modules = std::exchange(modules_, {});
  const auto items = std::exchange(items_, {});
  const auto entries = std::exchange(entries_, {});
  const auto rates = std::exchange(rates_, {});
  const auto places = std::exchange(places_, {});
  const auto hooks = std::exchange(hooks_, {}), trained = std::exchange(trained_, {});
  const auto params = std::exchange(group_params_, {});
  const py::object state = std::move(state_), drawing = std::move(drawing_), own_step = std::move(own_step_);
  const py::object optimizer = std::move(optimizer_);
}

bool WatchedStep::fits(PyObject* inputs, PyObject* target) const {
  for (PyObject* object : {inputs, target})
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(THPVariableClass)) return false;
  const at::Tensor &x = THPVariable_Unpack(inputs), &t = THPVariable_Unpack(target);
  for (const at::Tensor& tensor : {x, t})
    if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.requires_grad() || tensor.is_neg() ||
        tensor._is_zerotensor())
      return false;
  if (x.scalar_type() != at::kFloat || x.dim() != 2 || x.size(1) != in_ || x.size(0) == 0) return false;
  if (by_class_) return t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == x.size(0);
  return t.scalar_type() == at::kFloat && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == out_;
}

// As MLP draws: its own mode decides where the layers hold p, each dropout's mode where there are norms.
bool WatchedStep::read_dropout() {
  p_.clear();
  draws_ = false;
  const bool whole = !drawing_.is_none(), training = whole && item(drawing_.ptr(), names().training) == Py_True;
  for (const auto& [module, name] : rates_) {
    const std::optional<double> p = number(item(module.ptr(), name));
    if (!p || !(*p >= 0 && *p <= 1)) return false;
    p_.push_back(item(module.ptr(), names().training) == Py_True ? *p : 0.0);
    draws_ = draws_ || (whole ? training && *p > 0 : p_.back() > 0);
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
    const std::optional<MlpStepGroup> settings = settings_of(group, kind_ == Optimizer::adamw);
    if (!settings) return false;
    // Momentum that came after the state was looked at has no buffer yet.
    const bool heavy = settings->momentum != 0;
    if (heavy && (kind_ == Optimizer::rmsprop || (kind_ == Optimizer::sgd && !has_first_[i]))) return false;
    groups_.push_back(*settings);
  }
  return true;
}

py::object WatchedStep::run(const py::object& inputs, const py::object& target, double clip_norm, double scale) {
  MlpStepOutcome outcome{};
  const Flag busy(busy_);
  {
    const at::Tensor x = THPVariable_Unpack(inputs.ptr()), t = THPVariable_Unpack(target.ptr());
    // Another thread may swap tensors meanwhile.
    const References references(alive_, places_);
    const py::gil_scoped_release release;
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard unseen(kObserved);
    outcome = step_->take(x, t, p_, draws_, clip_norm, scale, groups_);
  }
  if (!outcome.taken) return py::bool_(false);
  for (const py::object& parameter : trained_) {
    const at::Tensor& tensor = THPVariable_Unpack(parameter.ptr());
    if (tensor.grad().defined()) tensor.mutable_grad().reset();
  }
  return py::make_tuple(outcome.loss, outcome.norm);
}

// The step behind an object; nullptr until its constructor is through, and after it failed.
WatchedStep* step_of(PyObject* self) {
  const auto place = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return place.holder_constructed() ? place.value_ptr<WatchedStep>() : nullptr;
}

void collect_garbage(PyHeapTypeObject* heap) {
  PyTypeObject* type = &heap->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const WatchedStep* step = step_of(self);
    return step ? step->each_object([&](PyObject* object) { return visit(object, arg); }) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (WatchedStep* step = step_of(self)) step->forget();
    return 0;
  };
}

}  // namespace

void bind_step(py::module_& m) {
  py::class_<WatchedStep>(m, "MlpStep", py::custom_type_setup(collect_garbage))
      .def(py::init([](const py::list& layers, const py::object& optimizer, const py::list& states,
                       const py::list& modules, const py::list& dicts, const py::list& entries, const py::list& rates,
                       const py::list& hooks, const py::object& drawing, const std::string& precision,
                       const std::string& activation, double negative_slope, const std::string& loss, bool mean,
                       double delta, double label_smoothing, int64_t ignore_index, const py::object& class_weights,
                       const std::string& kind) {
             return std::make_unique<WatchedStep>(
                 layers, optimizer, states, Watched{modules, dicts, entries, rates, drawing, hooks}, precision,
                 activation, negative_slope, MlpStepLoss{loss_of(loss), mean, delta, label_smoothing, ignore_index},
                 class_weights, kind);
           }),
           py::kw_only(), py::arg("layers"), py::arg("optimizer"), py::arg("states"), py::arg("modules"),
           py::arg("dicts"), py::arg("entries"), py::arg("rates"), py::arg("hooks"), py::arg("drawing"),
           py::arg("precision"), py::arg("activation"), py::arg("negative_slope"), py::arg("loss"), py::arg("mean"),
           py::arg("delta"), py::arg("label_smoothing"), py::arg("ignore_index"), py::arg("class_weights"),
           py::arg("kind"))
      .def("take", &WatchedStep::take, py::arg("inputs"), py::arg("target"), py::arg("clip_norm"), py::arg("scale"))
      .def("take_proven", &WatchedStep::take_proven, py::arg("inputs"), py::arg("target"), py::arg("clip_norm"),
           py::arg("scale"));
}

}  // namespace mlpkit
