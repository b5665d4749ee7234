// What torch's scaler does to gradients before a step, and a census of them in the same reading (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace mlpkit {

// gradients: strided, on the CPU, without gaps; each is multiplied in place by `factor`,
// rounded as float32 (float64 for that). Returns by gradient the largest magnitude before, Inf where one holds Inf or
// NaN. A factor of 1 writes nothing.
std::vector<double> unscale(const std::vector<at::Tensor>& gradients, float factor);

// Whether `unscale` may have it: torch refuses float16.
bool can_unscale(const at::Tensor& gradient);

}  // namespace mlpkit
