// The part of mlpkit._C that updates the parameters of a torch.optim.Optimizer on the CPU. Between steps it keeps no
// tensor and no object of the optimizer's, only what it knows of each parameter in a few bytes: it goes through the
// optimizer's own lists and state every time.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "bindings_update.h"
#include "bindings_update_settings.h"
#include "bindings_watch.h"
#include "ops/guarded_update.h"
#include "ops/guarded_update_lists.h"
#include "ops/huge_pages.h"

namespace mlpkit {
namespace {

struct StateNames {
  py::str momentum_buffer{"momentum_buffer"}, square_avg{"square_avg"}, grad_avg{"grad_avg"}, exp_avg{"exp_avg"},
      exp_avg_sq{"exp_avg_sq"}, max_exp_avg_sq{"max_exp_avg_sq"}, step{"step"};
};
// Never destroyed: the interpreter may be gone by then.
const StateNames& state_names() {
  static const StateNames* all = new StateNames();
  return *all;
}

// torch's names of first, second, third and step in the state of a group's parameters; nullptr where there is none.
std::array<const py::str*, 4> names_of(Optimizer kind, const GuardedGroup& group) {
  const StateNames& n = state_names();
  const py::str* momentum = group.momentum != 0 ? &n.momentum_buffer : nullptr;
  if (kind == Optimizer::sgd || kind == Optimizer::lars) return {momentum, nullptr, nullptr, nullptr};
  if (kind == Optimizer::rmsprop) return {momentum, &n.square_avg, group.centered ? &n.grad_avg : nullptr, &n.step};
  return {&n.exp_avg, &n.exp_avg_sq, group.amsgrad ? &n.max_exp_avg_sq : nullptr, &n.step};
}

// The upper half of a float, which is enough of an upper bound.
class Bound {
 public:
  Bound(double value = NAN) : bits_(std::isnan(value) ? kNan : above(value)) {}
  operator double() const { return number(bits_); }

 private:
  static constexpr uint16_t kNan = 0x7fc0;
  static float number(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static uint16_t above(double value) {
    const uint16_t bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16);
    return number(bits) < value ? bits + 1 : bits;  // the one after the largest number is Inf
  }
  uint16_t bits_;
};

// What the last step left of a parameter: upper bounds, valid while its tensors are as they were then.
struct Known {
  uint64_t seen = 0;
  Bound bounds[4];
};

uint64_t hash_of(const GuardedRow& row) {
  const Seen now = seen(row);
  uint64_t hash = 0x9e3779b97f4a7c15;
  const auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * 0xff51afd7ed558ccd;
    hash ^= hash >> 32;
  };
  for (int i = 0; i < 4; ++i) {
    mix(reinterpret_cast<uintptr_t>(now.data[i]));
    mix(now.version[i]);
  }
  return hash;
}

// Values of the state by parameter. Its order is that of the parameters as a rule, which saves looking them up.
class StateWalk {
 public:
  explicit StateWalk(PyObject* state) : state_(state) {}
  PyObject* of(PyObject* parameter) {
    Py_ssize_t position = position_;
    PyObject *key = nullptr, *value = nullptr;
    if (PyDict_Next(state_, &position, &key, &value) && key == parameter) {
      position_ = position;
      return value;
    }
    return PyDict_GetItem(state_, parameter);
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
};

class HostUpdate {
 public:
  explicit HostUpdate(const std::string& kind) : kind_(guarded_kind_from_name(kind)) {}

  // State was made anew: of these parameters, by place, the momentum buffer is empty.
  void prepared(std::vector<int32_t> fresh) {
    fresh_ = std::move(fresh);
    settled_ = false;
  }

  // None: state is missing, or does not fit. Otherwise (taken, reason, norm, factor, place, bad, unscaled).
  py::object step(const py::list& groups, const py::dict& state, double clip, const py::object& scale,
                  const py::object& clean, const py::object& found, const py::object& rule, bool force, bool unscale,
                  bool torch) {
    if (busy_) return py::none();
    Step step;
    step.options = StepArguments{clip, scale, clean, found, rule, force, unscale, torch}.options(groups);
    if (!gather(groups, state, step)) return py::none();
    const size_t count = step.rows.size();
    if (!settled_)
      for (const GuardedRow& row : step.rows)
        for (const at::Tensor* tensor : row.state()) collapse_into_huge_pages(*tensor);
    settled_ = true;
    GuardedUpdate update(kind_, std::move(step.rows));
    for (size_t i = 0; i < count; ++i) recall(update, i, step.places[i]);
    update.trust_extents();
    GuardedOutcome outcome{};
    busy_ = true;
    try {
      const py::gil_scoped_release release;
      const at::NoGradGuard no_grad;
      outcome = update.run(step.gradients, step.settings, step.options);
    } catch (...) {
      busy_ = false;
      throw;
    }
    busy_ = false;
    for (size_t i = 0; i < count; ++i) remember(update, i, step.places[i]);
    tell(update, step, outcome);
    const int64_t place = outcome.row < 0 ? -1 : step.places[outcome.row];
    return py::make_tuple(outcome.taken, static_cast<int>(outcome.reason), outcome.norm, outcome.factor, place,
                          outcome.rows, outcome.unscaled);
  }

  // Of the last step, by place: (NaN, Inf, first, absmax, sum of squares); empty where it was taken.
  py::list census() const {
    py::list result;
    for (const RangeCensus& row : census_)
      result.append(py::make_tuple(row.nan, row.inf, row.first, row.absmax, row.sum_of_squares));
    return result;
  }
  // Of the last step's gradients as they came, by place: the largest magnitude, Inf where one held Inf or NaN, NaN
  // where there was none; float32, or float64 where a parameter is that.
  at::Tensor absmax() const { return absmax_; }

  // What is kept between steps beside absmax(), which histories share.
  size_t bytes() const {
    return sizeof(*this) + known_.capacity() * sizeof(Known) + fresh_.capacity() * sizeof(int32_t) +
           census_.capacity() * sizeof(RangeCensus);
  }

 private:
  struct Step {
    GuardedOptions options;
    std::vector<GuardedGroup> settings;
    std::vector<GuardedRow> rows;
    std::vector<at::Tensor> gradients;
    std::vector<int32_t> places;  // by row: among all parameters
    size_t parameters = 0;
    bool wide = false;  // whether one is float64
  };

  bool gather(const py::list& groups, const py::dict& state, Step& step) {
    StateWalk walk(state.ptr());
    int32_t place = 0;
    for (const py::handle group : groups) {
      PyObject* params = group_params(group.ptr());
      if (!params) return false;
      const int64_t index = static_cast<int64_t>(step.settings.size());
      step.settings.push_back(group_settings(group.ptr(), nullptr));
      const auto names = names_of(kind_, step.settings.back());
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++place) {
        PyObject* parameter = PyList_GET_ITEM(params, i);
        if (!THPVariable_Check(parameter)) return false;
        const at::Tensor& p = THPVariable_Unpack(parameter);
        PyObject* entries = walk.of(parameter);
        at::Tensor gradient = p.grad();
        step.wide = step.wide || p.scalar_type() == at::kDouble;
        if (!gradient.defined()) continue;
        GuardedRow row;
        row.p = p;
        row.group = index;
        row.fresh = std::find(fresh_.begin(), fresh_.end(), place) != fresh_.end();
        if (!fill(row, names, entries) || !fits(row)) return false;
        step.rows.push_back(std::move(row));
        step.gradients.push_back(std::move(gradient));
        step.places.push_back(place);
      }
    }
    step.parameters = place;
    known_.resize(place);
    return true;
  }

  static bool fill(GuardedRow& row, const std::array<const py::str*, 4>& names, PyObject* entries) {
    at::Tensor* to[] = {&row.first, &row.second, &row.third, &row.step};
    for (int k = 0; k < 4; ++k) {
      if (!names[k]) continue;
      PyObject* value = entries && PyDict_Check(entries) ? item(entries, *names[k]) : nullptr;
      if (!value || !THPVariable_Check(value)) return false;
      *to[k] = THPVariable_Unpack(value);
    }
    return true;
  }

  static bool fits(const GuardedRow& row) {
    const at::Tensor& p = row.p;
    const auto like = [&](const at::Tensor& tensor) {
      return !tensor.defined() || (tensor.sizes() == p.sizes() && same_layout(tensor, p.strides()) &&
                                   tensor.scalar_type() == p.scalar_type() && tensor.is_cpu());
    };
    const at::Tensor& step = row.step;
    const bool counted = !step.defined() || (step.is_cpu() && step.numel() == 1 &&
                                             (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble));
    return counted && p.is_cpu() && !p.unsafeGetTensorImpl()->is_python_dispatch() && like(row.first) &&
           like(row.second) && like(row.third);
  }

  void recall(GuardedUpdate& update, size_t row, int32_t place) const {
    const Known& known = known_[place];
    if (known.seen != hash_of(update.rows()[row])) return;
    update.extents()[row] = {known.bounds[0], known.bounds[1], known.bounds[2], known.bounds[3]};
  }

  void remember(GuardedUpdate& update, size_t row, int32_t place) {
    const Extents& e = update.extents()[row];
    known_[place] = {hash_of(update.rows()[row]), {e.p, e.first, e.second, e.third}};
  }

  void tell(const GuardedUpdate& update, const Step& step, const GuardedOutcome& outcome) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    absmax_ = at::empty({static_cast<int64_t>(step.parameters)}, step.wide ? at::kDouble : at::kFloat);
    const auto put = [&](size_t place, double value) {
      if (step.wide)
        absmax_.mutable_data_ptr<double>()[place] = value;
      else
        absmax_.mutable_data_ptr<float>()[place] = static_cast<float>(value);
    };
    for (size_t place = 0; place < step.parameters; ++place) put(place, none);
    census_ = {};
    if (!outcome.taken) census_.assign(step.parameters, {0, 0, -1, none, 0, false});
    if (outcome.taken) std::erase_if(fresh_, [&](int32_t place) { return took_part(step, place); });
    // A step that was refused before its gradients were looked at has none.
    const std::vector<RangeCensus>& found = update.census();
    for (size_t row = 0; row < found.size(); ++row) {
      const RangeCensus& one = found[row];
      put(step.places[row],
          one.first >= 0 ? std::numeric_limits<double>::infinity() : one.absmax / update.unscaled_by());
      if (!outcome.taken) census_[step.places[row]] = one;
    }
  }

  static bool took_part(const Step& step, int32_t place) {
    return std::binary_search(step.places.begin(), step.places.end(), place);
  }

  Optimizer kind_;
  std::vector<Known> known_;         // by place
  std::vector<int32_t> fresh_;       // places; of sgd and lars
  std::vector<RangeCensus> census_;  // by place, of a step that was not taken
  at::Tensor absmax_;
  bool settled_ = false;
  bool busy_ = false;  // another thread is in a step of this object, outside the interpreter's lock
};

}  // namespace

void bind_host_update(py::module_& m) {
  py::class_<HostUpdate>(m, "HostUpdate")
      .def(py::init<const std::string&>(), py::arg("kind"))
      .def("prepared", &HostUpdate::prepared, py::arg("fresh"))
      .def("step", &HostUpdate::step, py::arg("groups"), py::arg("state"), py::arg("clip_norm"), py::arg("scale"),
           py::arg("clean_steps"), py::arg("found_inf"), py::arg("rule"), py::arg("force"), py::arg("unscale"),
           py::arg("torch"))
      .def("census", &HostUpdate::census)
      .def("absmax", &HostUpdate::absmax)
      .def("bytes", &HostUpdate::bytes);
}

}  // namespace mlpkit
