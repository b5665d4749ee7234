// The observer follows modules and backward passes. Part of the module mlpkit._C.
#include <torch/csrc/autograd/python_variable.h>

#include "bindings_follow.h"
#include "bindings_observe_tell.h"

namespace mlpkit::observing {
namespace {

// The only root of a backward pass, where that is a single number: a loss.
const at::Tensor* loss_of(py::handle roots) {
  if (!PyTuple_Check(roots.ptr()) || PyTuple_GET_SIZE(roots.ptr()) != 1) return nullptr;
  PyObject* root = PyTuple_GET_ITEM(roots.ptr(), 0);
  if (!THPVariable_Check(root)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(root);
  return tensor.defined() && plain(tensor) && tensor.numel() == 1 ? &tensor : nullptr;
}

bool outermost() { return torch::autograd::get_current_graph_task_id() == -1; }

}  // namespace

py::object Observer::follow(py::object call) {
  const auto alive = alive_;  // null once it stopped
  return follow_modules(
      {std::move(call), [alive] { return *alive != nullptr && (*alive)->here(); },
       [alive](const ModuleCall& call) { (*alive)->enter(call.module()); },
       [alive](const ModuleCall& call, py::handle output) { (*alive)->leave(call.module(), output); }});
}

py::object Observer::follow_backward(py::object engine) {
  const auto alive = alive_;
  return follow_function({std::move(engine), [alive] { return *alive != nullptr && (*alive)->here(); },
                          [alive](const ModuleCall& call) { (*alive)->begin_backward(call.arguments[0]); },
                          [alive](const ModuleCall&, py::handle output) { (*alive)->end_backward(bool(output)); }});
}

void Observer::begin_backward(py::handle roots) {
  if (outermost()) {
    in_optimizer = false;
    const at::Tensor* loss = loss_of(roots);
    const double value = loss ? unscaled(*loss) : -1;
    if (value < 0)
      tell("backward_from", roots);
    else
      tell("trained", value);
  }
  depths_.push_back(stack_.size());
  backward_line_ = lines_.here().line;
}

void Observer::end_backward(bool done) {
  if (!depths_.empty()) depths_.pop_back();
  if (done && outermost()) tell("backward_done", any_bad(), any_gradient_of_zeros());
}

}  // namespace mlpkit::observing
