// The part of mlpkit._C that updates the parameters of a torch.optim.Optimizer: it holds the parameters and state that
// Python has prepared, sees whether they are still the optimizer's, and makes a guarded update of them.
#include "bindings_update.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>

#include "bindings_watch.h"
#include "ops/guarded_update.h"
#include "ops/guarded_update_device.h"
#include "ops/huge_pages.h"

namespace mlpkit {
namespace {

struct UpdateNames {
  py::str lr{"lr"}, betas{"betas"}, alpha{"alpha"}, eps{"eps"}, momentum{"momentum"}, dampening{"dampening"},
      weight_decay{"weight_decay"}, l1{"l1"}, trust{"trust"}, nesterov{"nesterov"}, maximize{"maximize"},
      amsgrad{"amsgrad"}, centered{"centered"}, params{"params"}, fused{"fused"};
};
// Never destroyed: the interpreter may be gone by then.
const UpdateNames& update_names() {
  static const UpdateNames* all = new UpdateNames();
  return *all;
}

at::Tensor tensor_or_none(const char* what, const py::handle& object) {
  if (object.is_none()) return {};
  if (!THPVariable_Check(object.ptr()))
    throw py::type_error(std::string("OptimizerUpdate: ") + what + " is " + py::repr(object).cast<std::string>() +
                         "; it must be a tensor");
  return THPVariable_Unpack(object.ptr());
}

class OptimizerUpdate {
 public:
  // rows: (parameter, group, its dictionary in the state, names in it of first, second, third and step or None, its
  // low-precision copy or None, whether the momentum buffer is empty). groups: parameters by group.
  OptimizerUpdate(const std::string& kind, const py::list& rows, const py::list& groups, const py::dict& state)
      : state_(state), kind_(optimizer_of(kind)) {
    std::vector<GuardedRow> all = rows_of(rows);
    if (!all.empty() && !all[0].p.is_cpu())
      device_ = make_device_update(kind_, std::move(all));
    else
      host_ = std::make_unique<GuardedUpdate>(kind_, std::move(all));
    for (const py::handle group : groups) {
      auto& known = groups_.emplace_back();
      for (const py::handle parameter : group) known.push_back(parameter.cast<py::object>());
    }
    std::vector<PyObject*> taken;
    for (const py::handle row : rows) taken.push_back(row.cast<py::tuple>()[0].ptr());
    for (const auto& group : groups_)
      for (const py::object& parameter : group)
        if (std::find(taken.begin(), taken.end(), parameter.ptr()) == taken.end()) idle_.push_back(parameter);
    for (const GuardedRow& row : this->rows()) {
      places_.push_back({row.p.sizes().vec(), row.p.strides().vec(), row.p.scalar_type(), row.p.device()});
      for (const at::Tensor* tensor : {&row.p, &row.first, &row.second, &row.third}) collapse_into_huge_pages(*tensor);
    }
    lend(false);
  }

  // None: something is not as it was prepared. Otherwise (taken, reason, norm, factor, row, rows); on a device, where
  // nothing is read, the tensors (outcome, census).
  py::object step(const py::list& groups, const py::object& state, double clip, const py::object& scale,
                  const py::object& clean, const py::object& found, const py::object& rule, bool force, bool torch) {
    if (busy_ || state.ptr() != state_.dict.ptr()) return py::none();
    const Lending lending(*this);
    if (!same(groups)) return py::none();
    GuardedOptions options;
    options.clip = clip;
    options.scale = tensor_or_none("grad_scale", scale);
    options.clean = tensor_or_none("clean_steps", clean);
    options.found = tensor_or_none("found_inf", found);
    options.force = force;
    options.torch = torch;
    if (torch)
      for (const py::handle group : groups) options.fused.push_back(flag(item(group.ptr(), update_names().fused)));
    if (!rule.is_none()) {
      const auto [growth, backoff, interval, floor, ceiling] =
          rule.cast<std::tuple<double, double, int64_t, double, double>>();
      options.rule = {growth, backoff, floor, ceiling, interval};
    }
    std::vector<at::Tensor> gradients;
    for (const py::object& parameter : parameters_) gradients.push_back(THPVariable_Unpack(parameter.ptr()).grad());
    GuardedOutcome outcome{};
    std::tuple<at::Tensor, at::Tensor> queued;
    busy_ = true;
    try {
      const py::gil_scoped_release release;
      const at::NoGradGuard no_grad;
      if (device_)
        queued = device_->run(gradients, settings_, rates_, options);
      else
        outcome = host_->run(gradients, settings_, options);
    } catch (...) {
      busy_ = false;
      throw;
    }
    busy_ = false;
    if (device_) return py::make_tuple(std::get<0>(queued), std::get<1>(queued));
    return py::make_tuple(outcome.taken, static_cast<int>(outcome.reason), outcome.norm, outcome.factor, outcome.row,
                          outcome.rows);
  }

  // Of the last step, by row: (NaN, Inf, first, absmax, sum of squares).
  py::list census() const {
    py::list result;
    if (!host_) return result;
    for (const RangeCensus& row : host_->census())
      result.append(py::make_tuple(row.nan, row.inf, row.first, row.absmax, row.sum_of_squares));
    return result;
  }

  // What a device keeps of the steps (ops/guarded_update_device.h), or None.
  py::object log() const {
    const at::Tensor log = device_ ? device_->log() : at::Tensor();
    return log.defined() ? py::cast(log) : py::none();
  }

 private:
  struct Shape {
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    at::Device device;
  };
  struct Lending {
    OptimizerUpdate& owner;
    explicit Lending(OptimizerUpdate& to) : owner(to) { owner.lend(true); }
    ~Lending() { owner.lend(false); }
  };

  // Rows have their tensors for the length of a step only: torch.utils.swap_tensors refuses to swap what is held.
  void lend(bool whether) {
    std::vector<GuardedRow>& rows = this->rows();
    for (size_t i = 0; i < rows.size(); ++i) {
      at::Tensor* to[] = {&rows[i].p, &rows[i].first, &rows[i].second, &rows[i].third, &rows[i].step};
      for (int k = 0; k < 5; ++k)
        if (objects_[i][k]) *to[k] = whether ? THPVariable_Unpack(objects_[i][k]) : at::Tensor();
    }
  }

  std::vector<GuardedRow>& rows() { return device_ ? device_->rows() : host_->rows(); }

  static Optimizer optimizer_of(const std::string& name) {
    constexpr const char* names[] = {"sgd", "adam", "adamw", "rmsprop", "lars", "lamb"};
    for (int i = 0; i < 6; ++i)
      if (name == names[i]) return static_cast<Optimizer>(i);
    throw py::value_error("GuardedUpdate: kind is '" + name + "'; it must be sgd, adam, adamw, rmsprop, lars or lamb");
  }

  std::vector<GuardedRow> rows_of(const py::list& rows) {
    std::vector<GuardedRow> result;
    for (const py::handle entry : rows) {
      const auto parts = entry.cast<py::tuple>();
      GuardedRow row;
      row.p = THPVariable_Unpack(parts[0].ptr());
      parameters_.push_back(parts[0].cast<py::object>());
      row.group = parts[1].cast<int64_t>();
      Entries known{parts[2].cast<py::dict>(), {}};
      std::array<PyObject*, 5>& objects = objects_.emplace_back();
      objects[0] = parts[0].ptr();
      at::Tensor* to[] = {&row.first, &row.second, &row.third, &row.step};
      for (int i = 0; i < 4; ++i) {
        if (parts[3 + i].is_none()) continue;
        const auto key = parts[3 + i].cast<py::str>();
        known.known.emplace_back(key, known.dict[key].cast<py::object>());
        *to[i] = tensor_or_none(key.cast<std::string>().c_str(), known.dict[key]);
        objects[1 + i] = known.known.back().second.ptr();
      }
      entries_.push_back(std::move(known));
      row.copy = tensor_or_none("a copy", parts[7]);
      row.fresh = parts[8].cast<bool>();
      result.push_back(std::move(row));
    }
    return result;
  }

  bool same(const py::list& groups) {
    const UpdateNames& n = update_names();
    if (!state_.same() || groups.size() != groups_.size()) return false;
    for (const Entries& entries : entries_)
      if (!entries.same()) return false;
    for (const py::object& parameter : idle_)
      if (THPVariable_Unpack(parameter.ptr()).grad().defined()) return false;
    settings_.clear();
    rates_.clear();
    for (size_t i = 0; i < groups_.size(); ++i) {
      PyObject* group = PyList_GET_ITEM(groups.ptr(), i);
      PyObject* params = item(group, n.params);
      const auto& known = groups_[i];
      if (!params || !PyList_Check(params) || PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(known.size()))
        return false;
      for (size_t j = 0; j < known.size(); ++j)
        if (PyList_GET_ITEM(params, j) != known[j].ptr()) return false;
      settings_.push_back(read(group, device_ ? &rates_.emplace_back() : nullptr));
    }
    const std::vector<GuardedRow>& rows = this->rows();
    for (size_t i = 0; i < rows.size(); ++i)
      if (!fits(rows[i], places_[i])) return false;
    return true;
  }

  bool fits(const GuardedRow& row, const Shape& shape) const {
    const auto like = [&](const at::Tensor& tensor) {
      return !tensor.defined() || (tensor.sizes() == shape.sizes && same_layout(tensor, shape.strides) &&
                                   tensor.scalar_type() == shape.dtype && tensor.device() == shape.device);
    };
    const GuardedGroup& g = settings_[row.group];
    const bool momentum = g.momentum != 0 && kind_ != Optimizer::adam && kind_ != Optimizer::adamw;
    const at::Tensor& step = row.step;
    const bool counted = !step.defined() ||
                         (step.numel() == 1 && (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble));
    return counted && like(row.p) && like(row.first) && like(row.second) && like(row.third) &&
           (row.first.defined() || !momentum) && (row.third.defined() || !(g.amsgrad || g.centered));
  }

  static double value(PyObject* object, double otherwise) {
    if (object == nullptr || object == Py_None) return otherwise;
    if (const std::optional<double> number = mlpkit::number(object)) return *number;
    if (THPVariable_Check(object)) return THPVariable_Unpack(object).item().toDouble();
    return py::float_(py::reinterpret_borrow<py::object>(object));
  }
  static bool flag(PyObject* object) {
    return object != nullptr && object != Py_False && object != Py_None && PyObject_IsTrue(object) == 1;
  }

  // rate: gets a learning rate that lies on a device, which is not read.
  static GuardedGroup read(PyObject* group, at::Tensor* rate) {
    const UpdateNames& n = update_names();
    GuardedGroup g{};
    const auto of = [&](const py::str& name, double otherwise) { return value(item(group, name), otherwise); };
    PyObject* lr = item(group, n.lr);
    if (rate && lr && THPVariable_Check(lr) && THPVariable_Unpack(lr).is_cuda())
      *rate = THPVariable_Unpack(lr);
    else
      g.lr = value(lr, 0);
    g.eps = of(n.eps, 0);
    g.momentum = of(n.momentum, 0);
    g.dampening = of(n.dampening, 0);
    g.weight_decay = of(n.weight_decay, 0);
    g.l1 = of(n.l1, 0);
    g.trust = of(n.trust, 0);
    PyObject* betas = item(group, n.betas);
    if (betas != nullptr) {
      const auto both = py::reinterpret_borrow<py::sequence>(betas);
      g.beta1 = value(py::object(both[0]).ptr(), 0);
      g.beta2 = value(py::object(both[1]).ptr(), 0);
    } else {
      g.beta2 = of(n.alpha, 0);
    }
    g.nesterov = flag(item(group, n.nesterov));
    g.maximize = flag(item(group, n.maximize));
    g.amsgrad = flag(item(group, n.amsgrad));
    g.centered = flag(item(group, n.centered));
    return g;
  }

  Items state_;
  std::vector<py::object> parameters_, idle_;  // by row; without a row
  std::vector<Entries> entries_;
  std::vector<std::array<PyObject*, 5>>
      objects_;  // by row: parameter, first, second, third, step; those above own them
  Optimizer kind_;
  std::unique_ptr<GuardedUpdate> host_;  // one of these two
  std::unique_ptr<DeviceUpdate> device_;
  std::vector<std::vector<py::object>> groups_;
  std::vector<Shape> places_;
  std::vector<GuardedGroup> settings_;
  std::vector<at::Tensor> rates_;  // by group, on a device
  bool busy_ = false;              // another thread is in a step of this object, outside the interpreter's lock
};

}  // namespace

void bind_update(py::module_& m) {
  py::class_<OptimizerUpdate>(m, "OptimizerUpdate")
      .def(py::init<const std::string&, const py::list&, const py::list&, const py::dict&>(), py::arg("kind"),
           py::arg("rows"), py::arg("groups"), py::arg("state"))
      .def("step", &OptimizerUpdate::step, py::arg("groups"), py::arg("state"), py::arg("clip_norm"), py::arg("scale"),
           py::arg("clean_steps"), py::arg("found_inf"), py::arg("rule"), py::arg("force"), py::arg("torch"))
      .def("census", &OptimizerUpdate::census)
      .def("log", &OptimizerUpdate::log);
}

}  // namespace mlpkit
