// What the updates of mlpkit._C read of a torch.optim.Optimizer.
#include "bindings_update_settings.h"

#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "bindings_watch.h"

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

double value(PyObject* object, double otherwise) {
  if (object == nullptr || object == Py_None) return otherwise;
  if (const std::optional<double> number = mlpkit::number(object)) return *number;
  if (THPVariable_Check(object)) return THPVariable_Unpack(object).item().toDouble();
  return py::float_(py::reinterpret_borrow<py::object>(object));
}
bool flag(PyObject* object) {
  return object != nullptr && object != Py_False && object != Py_None && PyObject_IsTrue(object) == 1;
}

}  // namespace

at::Tensor tensor_or_none(const char* what, const py::handle& object) {
  if (object.is_none()) return {};
  if (!THPVariable_Check(object.ptr()))
    throw py::type_error(std::string("OptimizerUpdate: ") + what + " is " + py::repr(object).cast<std::string>() +
                         "; it must be a tensor");
  return THPVariable_Unpack(object.ptr());
}

PyObject* group_params(PyObject* group) {
  PyObject* params = PyDict_Check(group) ? item(group, update_names().params) : nullptr;
  return params && PyList_Check(params) ? params : nullptr;
}

GuardedGroup group_settings(PyObject* group, at::Tensor* rate) {
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

GuardedOptions StepArguments::options(const py::list& groups) const {
  GuardedOptions options;
  options.clip = clip;
  options.scale = tensor_or_none("grad_scale", scale);
  options.clean = tensor_or_none("clean_steps", clean);
  options.found = tensor_or_none("found_inf", found);
  options.force = force;
  options.unscale = unscale;
  options.torch = torch;
  if (torch)
    for (const py::handle group : groups) options.fused.push_back(flag(item(group.ptr(), update_names().fused)));
  if (!rule.is_none()) {
    const auto [growth, backoff, interval, floor, ceiling] =
        rule.cast<std::tuple<double, double, int64_t, double, double>>();
    options.rule = {growth, backoff, floor, ceiling, interval};
  }
  return options;
}

}  // namespace mlpkit
