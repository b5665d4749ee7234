// Where the observer of operations stands in the dispatcher (ops).
#pragma once
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace mlpkit {

// A key below autograd and Python's modes that torch keeps for out-of-tree use: what passes by are the operations that
// compute, each once, and nothing that their kernels call.
constexpr c10::DispatchKey kObserved = c10::DispatchKey::Fake;

// Whether operations of this thread are observed.
inline bool observed() { return c10::impl::tls_is_dispatch_key_included(kObserved); }

}  // namespace mlpkit
