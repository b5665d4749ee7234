// The path of linear_act_dropout for layers with many in_features and out_features, where it was built (ops).
#pragma once
#include "ops/linear_act_dropout.h"

namespace mlpkit {

class CudaCall;

// Whether the kernels of cuda/wide_linear.h are allowed (ops/cuda_kernels.h) and can take this layer on the current
// device. What they save is what the other paths save.
bool takes_wide_kernels(const LinearActDropout& op);

struct WideOptions {
  double negative_slope;
  uint32_t stream;
  bool save;
  bool census = false;
  bool pingpong = false;  // the other schedule, for bf16
};

// y, z, bits and, if wanted, the census of y: the largest finite magnitude as a bit pattern, and whether there is a
// non-finite element.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wide_forward(
    const LinearActDropout& op, const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, const WideOptions& options);

// What a layer saves for its backward pass, and its options.
struct SavedLayer {
  at::Tensor weight, z, bits;
  std::string_view activation;
  double negative_slope, p;
};

// A network's backward pass from layer to layer: the gradient by a layer's z at once with the product that leads to it
// from the layer that follows, so that the gradient by its y is never in memory. Real CUDA tensors only: whatever
// traces or watches operators sees the layers' own.
#ifdef MLPKIT_CUDA_MINIMUM
bool wide_kernels_lead(const at::Tensor& dy, const at::Tensor& weight, const SavedLayer& to);
std::pair<at::Tensor, at::Tensor> wide_gradient(const at::Tensor& dz, const at::Tensor& weight, const SavedLayer& to);
// dz and dbias of a layer by the element-wise kernel.
std::pair<at::Tensor, at::Tensor> gradient_by_z(const at::Tensor& dy, const SavedLayer& layer);
#else
inline bool wide_kernels_lead(const at::Tensor&, const at::Tensor&, const SavedLayer&) { return false; }
inline std::pair<at::Tensor, at::Tensor> wide_gradient(const at::Tensor&, const at::Tensor&, const SavedLayer&) {
  return {};
}
inline std::pair<at::Tensor, at::Tensor> gradient_by_z(const at::Tensor&, const SavedLayer&) { return {}; }
#endif

}  // namespace mlpkit
