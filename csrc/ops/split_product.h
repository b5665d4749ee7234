// Products of matrices on a CUDA device as layers take them (ops).
#pragma once
#include <ATen/core/Tensor.h>

namespace mlpkit {

// Whether a b would be made by the kernel of cuda/split_product.h: it is asked for and allowed (ops/cuda_kernels.h), it
// can take these matrices on the current device, and there is enough to do.
bool takes_split_product(const at::Tensor& a, const at::Tensor& b);

// a [rows, depth] times b [depth, cols], of one dtype: by that kernel, or by torch.
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b);
void matrix_product_out(const at::Tensor& to, const at::Tensor& a, const at::Tensor& b);

}  // namespace mlpkit
