// The watch level's outputs: each module's, looked at as it is returned. Python is told of outermost calls and of what
// is bad. Part of the module mlpkit._C.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

#include "bindings_follow.h"
#include "bindings_tell.h"
#include "ops/look.h"

namespace mlpkit {
namespace {

thread_local int following = 0;

double limit_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 65504;
    case at::kBFloat16:
      return 0x1.fep127;
    case at::kFloat:
      return std::numeric_limits<float>::max();
    default:
      return std::numeric_limits<double>::max();
  }
}

class Outputs {
 public:
  explicit Outputs(py::object host) : host_(std::move(host)) {}
  ~Outputs() { stop(); }
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;

  py::object follow(py::object call) {
    const auto alive = alive_;
    thread_ = std::this_thread::get_id();
    ++following;
    return follow_modules({std::move(call),
                           [alive] { return *alive && (*alive)->thread_ == std::this_thread::get_id(); },
                           [alive](const ModuleCall& call) { (*alive)->enter(call); },
                           [alive](const ModuleCall& call, py::handle output) { (*alive)->leave(call, output); }});
  }
  void stop() {
    if (*alive_ == nullptr) return;
    *alive_ = nullptr;
    following = std::max(0, following - 1);
  }
  void adopt(py::handle module, py::object name) {
    numbers_[module.ptr()] = static_cast<int>(names_.size());
    names_.push_back(std::move(name));
    peaks_.push_back(-1);
    limits_.push_back(0);
  }
  void forget(uintptr_t module) { numbers_.erase(reinterpret_cast<PyObject*>(module)); }

  bool any() const { return !order_.empty(); }
  // Magnitudes by name, in the order in which the outputs were made; Inf for what holds NaN or Inf.
  py::dict take() {
    py::dict found;
    for (const int number : order_) {
      found[names_[number]] = peaks_[number];
      peaks_[number] = -1;
    }
    order_.clear();
    last_.reset();
    return found;
  }
  // The limits of their dtypes, by name.
  py::dict limits() const {
    py::dict found;
    for (size_t i = 0; i < names_.size(); ++i)
      if (limits_[i] > 0) found[names_[i]] = limits_[i];
    return found;
  }
  bool paused = false;

 private:
  bool off() const { return paused || torch::autograd::get_current_graph_task_id() != -1; }

  void enter(const ModuleCall& call) {
    if (depth_++ > 0 || off()) return;
    py::tuple positional(call.count - 1);
    for (Py_ssize_t i = 1; i < call.count; ++i) positional[i - 1] = py::handle(call.arguments[i]);
    py::dict named;
    for (Py_ssize_t i = 0; call.names && i < PyTuple_GET_SIZE(call.names); ++i)
      named[py::handle(PyTuple_GET_ITEM(call.names, i))] = py::handle(call.arguments[call.count + i]);
    tell(host_, "entered", call.module(), positional, named);
  }

  void leave(const ModuleCall& call, py::handle output) {
    depth_ = std::max(0, depth_ - 1);
    if (!output || off()) return;
    const auto found = numbers_.find(call.arguments[0]);
    if (found != numbers_.end() && look(found->second, output)) tell(host_, "bad_output", names_[found->second]);
    if (depth_ == 0) tell(host_, "left", call.module(), output);
  }

  // Whether it holds NaN or Inf. A container's output is its last child's.
  bool look(int number, py::handle output) {
    tensors_.clear();
    gather(output);
    if (PyDict_Check(output.ptr()))
      for (const auto& item : py::reinterpret_borrow<py::dict>(output)) gather(item.second);
    else if (PyTuple_Check(output.ptr()) || PyList_Check(output.ptr()))
      for (const py::handle item : output) gather(item);
    if (tensors_.empty()) return false;
    const c10::TensorImpl* first = tensors_[0].unsafeGetTensorImpl();
    if (tensors_.size() == 1 && last_ && !last_->expired() && last_->_unsafe_get_target() == first) return false;
    last_.emplace(tensors_[0].getIntrusivePtr());
    double largest = -1, limit = std::numeric_limits<double>::max();
    for (const at::Tensor& tensor : tensors_) {
      if (!plain(tensor)) continue;
      largest = std::max(largest, peak(tensor));
      limit = std::min(limit, limit_of(tensor.scalar_type()));
    }
    tensors_.clear();
    if (largest < 0) return false;
    if (peaks_[number] < 0) order_.push_back(number);
    peaks_[number] = std::max(peaks_[number], largest);
    limits_[number] = limit;
    return largest == std::numeric_limits<double>::infinity();
  }

  void gather(py::handle value) {
    if (THPVariable_Check(value.ptr())) tensors_.push_back(THPVariable_Unpack(value.ptr()));
  }

  py::object host_;
  std::shared_ptr<Outputs*> alive_ = std::make_shared<Outputs*>(this);
  std::thread::id thread_;
  std::unordered_map<PyObject*, int> numbers_;
  std::vector<py::object> names_;
  std::vector<double> peaks_, limits_;
  std::vector<int> order_;
  std::vector<at::Tensor> tensors_;
  std::optional<c10::weak_intrusive_ptr<c10::TensorImpl>> last_;
  int depth_ = 0;
};

}  // namespace

bool outputs_followed() { return following > 0; }

void bind_outputs(py::module_& m) {
  py::class_<Outputs>(m, "Outputs")
      .def(py::init<py::object>(), py::arg("host"))
      .def("follow", &Outputs::follow)
      .def("stop", &Outputs::stop)
      .def("adopt", &Outputs::adopt)
      .def("forget", &Outputs::forget)
      .def("any", &Outputs::any)
      .def("take", &Outputs::take)
      .def("limits", &Outputs::limits)
      .def_readwrite("paused", &Outputs::paused);
}

}  // namespace mlpkit
