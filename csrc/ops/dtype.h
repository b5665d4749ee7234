// torch's dtypes as the kernels know them (ops).
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "core/dtype.h"

namespace mlpkit {

// Raises TypeError, naming the op and the argument, for a dtype that no kernel takes.
inline Dtype dtype_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::float64;
    case at::kFloat:
      return Dtype::float32;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " is ", tensor.scalar_type(),
                       "; it must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace mlpkit
