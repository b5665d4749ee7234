// Calls from native code that follows a program into the Python that judges it. Part of the module mlpkit._C.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>

namespace mlpkit {

// An error is reported and never reaches the program; an interrupt reaches it a moment later.
template <class Work>
void without_harm(Work work) {
  try {
    work();
  } catch (pybind11::error_already_set& error) {
    if (error.matches(PyExc_KeyboardInterrupt))
      PyErr_SetInterrupt();
    else
      error.discard_as_unraisable("mlpkit.trace");
  }
}

template <class... Args>
void tell(const pybind11::object& host, const char* method, Args&&... args) {
  without_harm([&] { host.attr(method)(std::forward<Args>(args)...); });
}

}  // namespace mlpkit
