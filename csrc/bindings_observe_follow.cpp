// The observer follows modules. Part of the module mlpkit._C.
#include "bindings_follow.h"
#include "bindings_observe.h"

namespace mlpkit::observing {

py::object Observer::follow(py::object call) {
  const auto alive = alive_;  // null once it stopped
  return follow_modules(
      {std::move(call), [alive] { return *alive != nullptr && (*alive)->here(); },
       [alive](const ModuleCall& call) { (*alive)->enter(call.module()); },
       [alive](const ModuleCall& call, py::handle output) { (*alive)->leave(call.module(), output); }});
}

}  // namespace mlpkit::observing
