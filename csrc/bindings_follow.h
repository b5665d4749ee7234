// Module.__call__ in place of torch's, which goes by a follower on its way in and out. Part of the module mlpkit._C.
#pragma once
#include <pybind11/pybind11.h>

#include <functional>

namespace mlpkit {

namespace py = pybind11;

// A module's call as Python's vectorcall gives it: the module, then its arguments, named ones last.
struct ModuleCall {
  PyObject* const* arguments;
  Py_ssize_t count;
  PyObject* names;
  py::handle module() const { return arguments[0]; }
};

// For any function the same: its arguments, named ones last.
struct Follower {
  py::object call;             // what a call goes on to
  std::function<bool()> here;  // whether this thread's calls are followed, now
  std::function<void(const ModuleCall&)> enter;
  std::function<void(const ModuleCall&, py::handle output)> leave;  // without an output after an error
};

py::object follow_modules(Follower follower);
// The same for a function in place of another one.
py::object follow_function(Follower follower);

// Whether outputs of modules are followed in this thread, without all operations being observed.
bool outputs_followed();
void bind_outputs(py::module_& m);

}  // namespace mlpkit
