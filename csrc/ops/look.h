// The cheapest look at a tensor that still tells whether it holds NaN or Inf, and how large it is (ops).
#pragma once
#include <ATen/core/Tensor.h>

namespace mlpkit {

// Whether a tensor can be looked at: dense, floating-point, with memory behind it, and no wrapper around another.
bool plain(const at::Tensor& tensor);
// The largest magnitude; infinity where there is NaN or Inf. Another device's tensor is looked at on the host.
double peak(const at::Tensor& tensor);

}  // namespace mlpkit
