// Calls from the observer into Python. Part of the module mlpkit._C.
#pragma once
#include <ATen/core/grad_mode.h>

#include "bindings_observe.h"

namespace mlpkit::observing {

// Nothing that Python does here is observed, and no autograd graph grows. An error there is reported and never reaches
// the program; an interrupt reaches it a moment later.
template <class... Args>
void Observer::tell(const char* method, Args&&... args) {
  const at::NoGradGuard no_graph;
  ++paused;
  try {
    host_.attr(method)(std::forward<Args>(args)...);
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_KeyboardInterrupt))
      PyErr_SetInterrupt();
    else
      error.discard_as_unraisable("mlpkit.trace");
  }
  --paused;
}

}  // namespace mlpkit::observing
