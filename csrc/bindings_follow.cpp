// Module.__call__ while modules are followed: plain C, since every module call goes through it. Part of mlpkit._C.
#include "bindings_follow.h"

namespace mlpkit {
namespace {

constexpr const char* kName = "mlpkit.follower";

Follower* follower_in(PyObject* capsule) { return static_cast<Follower*>(PyCapsule_GetPointer(capsule, kName)); }

PyObject* followed_call(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  const Follower* follower = follower_in(capsule);
  if (count < 1 || !follower->here()) return PyObject_Vectorcall(follower->call.ptr(), arguments, count, names);
  const ModuleCall call{arguments, count, names};
  follower->enter(call);
  PyObject* output = PyObject_Vectorcall(follower->call.ptr(), arguments, count, names);
  if (follower->here()) follower->leave(call, output);
  return output;
}

PyMethodDef definition{"__call__", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(followed_call)),
                       METH_FASTCALL | METH_KEYWORDS, nullptr};

}  // namespace

py::object follow_function(Follower follower) {
  const py::capsule state(new Follower(std::move(follower)), kName,
                          [](PyObject* capsule) { delete follower_in(capsule); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, state.ptr()));
}

py::object follow_modules(Follower follower) {
  return py::reinterpret_steal<py::object>(PyInstanceMethod_New(follow_function(std::move(follower)).ptr()));
}

}  // namespace mlpkit
