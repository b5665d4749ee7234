// The part of mlpkit._C that updates the parameters of a torch.optim.Optimizer on a device: it holds the parameters and
// state that Python has prepared, sees whether they are still the optimizer's, and queues a guarded update of them.
#include "bindings_update.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "bindings_update_settings.h"
#include "bindings_watch.h"
#include "ops/guarded_update_device.h"
#include "ops/guarded_update_lists.h"

namespace mlpkit {
namespace {

class DeviceRows {
 public:
  // rows: (parameter, group, its dictionary in the state, names in it of first, second, third and step or None, its
  // low-precision copy or None, whether the momentum buffer is empty). groups: parameters by group.
  DeviceRows(const std::string& kind, const py::list& rows, const py::list& groups, const py::dict& state)
      : state_(state), kind_(guarded_kind_from_name(kind)) {
    device_ = make_device_update(kind_, rows_of(rows));
    for (const py::handle group : groups) {
      auto& known = groups_.emplace_back();
      for (const py::handle parameter : group) known.push_back(parameter.cast<py::object>());
    }
    size_t row = 0;  // in their groups' order
    for (const auto& group : groups_)
      for (const py::object& parameter : group)
        if (row < parameters_.size() && parameters_[row].is(parameter))
          ++row;
        else
          idle_.push_back(parameter);
    for (const GuardedRow& row : device_->rows())
      places_.push_back({row.p.sizes().vec(), row.p.strides().vec(), row.p.scalar_type(), row.p.device()});
    lend(false);
  }

  // None: something is not as it was prepared. Otherwise the tensors (outcome, census), which nothing has read.
  py::object step(const py::list& groups, const py::object& state, double clip, const py::object& scale,
                  const py::object& clean, const py::object& found, const py::object& rule, bool force) {
    if (busy_ || state.ptr() != state_.dict.ptr()) return py::none();
    const Lending lending(*this);
    if (!same(groups)) return py::none();
    const GuardedOptions options = StepArguments{clip, scale, clean, found, rule, force, false, false}.options(groups);
    std::vector<at::Tensor> gradients;
    for (const py::object& parameter : parameters_) gradients.push_back(THPVariable_Unpack(parameter.ptr()).grad());
    std::tuple<at::Tensor, at::Tensor> queued;
    busy_ = true;
    try {
      const py::gil_scoped_release release;
      const at::NoGradGuard no_grad;
      queued = device_->run(gradients, settings_, rates_, options);
    } catch (...) {
      busy_ = false;
      throw;
    }
    busy_ = false;
    return py::make_tuple(std::get<0>(queued), std::get<1>(queued));
  }

  // What a device keeps of the steps (ops/guarded_update_device.h), or None.
  py::object log() const {
    const at::Tensor log = device_->log();
    return log.defined() ? py::cast(log) : py::none();
  }

 private:
  struct Shape {
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    at::Device device;
  };
  struct Lending {
    DeviceRows& owner;
    explicit Lending(DeviceRows& to) : owner(to) { owner.lend(true); }
    ~Lending() { owner.lend(false); }
  };

  // Rows have their tensors for the length of a step only: torch.utils.swap_tensors refuses to swap what is held.
  void lend(bool whether) {
    std::vector<GuardedRow>& rows = device_->rows();
    for (size_t i = 0; i < rows.size(); ++i) {
      at::Tensor* to[] = {&rows[i].p, &rows[i].first, &rows[i].second, &rows[i].third, &rows[i].step};
      for (int k = 0; k < 5; ++k)
        if (objects_[i][k]) *to[k] = whether ? THPVariable_Unpack(objects_[i][k]) : at::Tensor();
    }
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
    if (!state_.same() || groups.size() != groups_.size()) return false;
    for (const Entries& entries : entries_)
      if (!entries.same()) return false;
    for (const py::object& parameter : idle_)
      if (THPVariable_Unpack(parameter.ptr()).grad().defined()) return false;
    settings_.clear();
    rates_.clear();
    for (size_t i = 0; i < groups_.size(); ++i) {
      PyObject* group = PyList_GET_ITEM(groups.ptr(), i);
      PyObject* params = group_params(group);
      const auto& known = groups_[i];
      if (!params || PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(known.size())) return false;
      for (size_t j = 0; j < known.size(); ++j)
        if (PyList_GET_ITEM(params, j) != known[j].ptr()) return false;
      settings_.push_back(group_settings(group, &rates_.emplace_back()));
    }
    const std::vector<GuardedRow>& rows = device_->rows();
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

  Items state_;
  std::vector<py::object> parameters_, idle_;  // by row; without a row
  std::vector<Entries> entries_;
  std::vector<std::array<PyObject*, 5>>
      objects_;  // by row: parameter, first, second, third, step; those above own them
  Optimizer kind_;
  std::unique_ptr<DeviceUpdate> device_;
  std::vector<std::vector<py::object>> groups_;
  std::vector<Shape> places_;
  std::vector<GuardedGroup> settings_;
  std::vector<at::Tensor> rates_;  // by group, on a device
  bool busy_ = false;              // another thread is in a step of this object, outside the interpreter's lock
};

}  // namespace

void bind_update(py::module_& m) {
  bind_host_update(m);
  py::class_<DeviceRows>(m, "DeviceUpdate")
      .def(py::init<const std::string&, const py::list&, const py::list&, const py::dict&>(), py::arg("kind"),
           py::arg("rows"), py::arg("groups"), py::arg("state"))
      .def("step", &DeviceRows::step, py::arg("groups"), py::arg("state"), py::arg("clip_norm"), py::arg("scale"),
           py::arg("clean_steps"), py::arg("found_inf"), py::arg("rule"), py::arg("force"))
      .def("log", &DeviceRows::log);
}

}  // namespace mlpkit
