// Memory of large results, kept from call to call (ops).
#pragma once
#include <ATen/core/Tensor.h>

namespace mlpkit {

// Like at::empty on the CPU, contiguous. A training step frees its activations and gradients and asks for the same
// sizes again; fresh pages for them would be zeroed by the system, which takes a tenth of a wide layer's time. So up to
// kMostKept bytes of freed blocks wait for the next tensor of their size, in huge pages where the system has them.
at::Tensor empty_kept(at::IntArrayRef sizes, const at::TensorOptions& options);

constexpr size_t kMostKept = size_t{256} << 20;

}  // namespace mlpkit
