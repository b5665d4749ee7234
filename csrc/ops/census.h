// The census of one tensor, for C++ callers (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include "cpu/census.h"

namespace mlpkit {

// On the CPU, over as many threads as torch may use; strided tensors in logical order.
CensusResult census_of(const at::Tensor& tensor, bool histogram);

}  // namespace mlpkit
