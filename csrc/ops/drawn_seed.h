// The seed of a mask that was given none (ops).
#pragma once
#include <ATen/core/Tensor.h>

namespace mlpkit {

// torch.randint(-2^63, 2^63 - 1, (2,)) on a device: the same numbers from the same generator, which torch.manual_seed
// sets. On the CPU they are taken from it without the dispatcher where nobody watches or transforms operations.
at::Tensor drawn_seed(at::Device device);

}  // namespace mlpkit
