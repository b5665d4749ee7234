// Calls from the observer into Python. Part of the module mlpkit._C.
#pragma once
#include <ATen/core/grad_mode.h>

#include "bindings_observe.h"
#include "bindings_tell.h"

namespace mlpkit::observing {

// Nothing that Python does here is observed, and no autograd graph grows.
template <class Work>
void Observer::quietly(Work work) {
  const at::NoGradGuard no_graph;
  ++paused;
  without_harm(work);
  --paused;
}

template <class... Args>
void Observer::tell(const char* method, Args&&... args) {
  quietly([&] { host_.attr(method)(std::forward<Args>(args)...); });
}

}  // namespace mlpkit::observing
