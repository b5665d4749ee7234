// Parameters that an update does not move. Part of the module mlpkit._C.
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "bindings_observe_tell.h"

namespace mlpkit::observing {
namespace {

constexpr int64_t kYoung = 4;  // updates after which a parameter that moved is taken to move on

std::vector<char> bits_of(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.is_contiguous() ? tensor : copy_of(tensor);
  const char* data = static_cast<const char*>(whole.const_data_ptr());
  return {data, data + whole.nbytes()};
}

// Some lines of memory, spread over a contiguous tensor.
std::vector<char> few_bits_of(const at::Tensor& tensor) {
  constexpr size_t kLine = 64, kLines = 16;
  const size_t bytes = tensor.nbytes();
  if (bytes <= 2 * kLine * kLines) return bits_of(tensor);
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  std::vector<char> found(kLine * kLines);
  for (size_t i = 0; i < kLines; ++i)
    std::memcpy(found.data() + i * kLine, data + (bytes - kLine) * i / (kLines - 1), kLine);
  return found;
}

py::object entry(py::handle dict, const char* key) {
  PyObject* found = PyDict_GetItemString(dict.ptr(), key);
  return found == nullptr ? py::object(py::none()) : py::reinterpret_borrow<py::object>(found);
}

// A step of torch's own, and nobody's function is called in it.
bool is_torchs(py::handle optimizer) {
  const py::object module = py::type::handle_of(optimizer).attr("__module__");
  for (const char* hooks : {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"})
    if (py::len(optimizer.attr(hooks)) > 0) return false;
  return PyUnicode_Check(module.ptr()) && module.cast<std::string_view>().substr(0, 12) == "torch.optim.";
}

}  // namespace

bool Observer::begin_update(py::handle optimizer) {
  if (!here()) return false;
  in_optimizer = true;
  learning_rate.reset();
  update_spot_.reset();
  bool changed = true;
  quietly([&] {
    for (const py::handle group : optimizer.attr("param_groups")) {
      const py::object rate = entry(group, "lr");
      if (!rate.is_none()) learning_rate = std::max(learning_rate.value_or(-INFINITY), py::float_(rate).cast<double>());
      if (rate.is_none() || (PyFloat_Check(rate.ptr()) && PyFloat_AS_DOUBLE(rate.ptr()) != 0))
        keep_bits(entry(group, "params"));
    }
    if (is_torchs(optimizer)) update_spot_ = lines_.here();
    changed = is_new(optimizer);
  });
  ++updates_;
  return changed;
}

bool Observer::end_update(py::handle optimizer) {
  if (!here()) return false;
  in_optimizer = false;
  ended = true;
  still_.clear();
  for (const Moving& one : moving_)
    if (one.parameter.grad().defined() && one.bits == (one.whole ? bits_of(one.parameter) : few_bits_of(one.parameter)))
      still_.push_back(one.parameter);
  moved_ = moving_.size();
  suspicious_ = !still_.empty();
  moving_.clear();
  bool changed = true;
  quietly([&] { changed = is_new(optimizer); });
  return changed || suspicious_;
}

// Another state, more or fewer entries in it, other groups.
bool Observer::is_new(py::handle optimizer) {
  const py::object state = optimizer.attr("state"), groups = optimizer.attr("param_groups");
  std::vector<Py_ssize_t> now{reinterpret_cast<Py_ssize_t>(state.ptr()), 0};
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);)
    now[1] += static_cast<Py_ssize_t>(py::len(value));
  for (const py::handle group : groups) now.push_back(static_cast<Py_ssize_t>(py::len(entry(group, "params"))));
  std::vector<Py_ssize_t>& known = optimizers_[optimizer.ptr()];
  if (known == now) return false;
  known = std::move(now);
  return true;
}

void Observer::keep_bits(py::handle parameters) {
  for (const py::handle object : parameters) {
    if (!THPVariable_Check(object.ptr())) continue;
    const at::Tensor& parameter = THPVariable_Unpack(object.ptr());
    const at::Tensor& gradient = parameter.grad();
    if (!gradient.defined() || !gradient.is_cpu() || !plain(gradient) || !parameter.is_cpu() || !plain(parameter))
      continue;
    const Cell* cell = memory_.find(gradient);
    if (cell != nullptr && cell->bad) continue;
    // All bits are kept while it is young, and once a few of them did not move.
    const bool whole = !parameter.is_contiguous() || updates_ < kYoung || suspicious_;
    moving_.push_back({parameter, whole ? bits_of(parameter) : few_bits_of(parameter), whole});
  }
}

std::pair<std::vector<at::Tensor>, size_t> Observer::unmoved() {
  return {std::exchange(still_, {}), std::exchange(moved_, 0)};
}

}  // namespace mlpkit::observing
