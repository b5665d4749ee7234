// What the CUDA paths of linear_act_dropout share, and the path for few in_features (ops).
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/linear_act_dropout.h"

namespace mlpkit {

// What a call needs of the runtime: x's device current, its stream, and neither autograd nor autocast between us and
// the library's GEMM.
class CudaCall {
 public:
  explicit CudaCall(const at::Tensor& x) : device_(x.device()), no_autocast_(c10::autocast_dispatch_keyset) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device().index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.device().index()));
    TORCH_CHECK_NOT_IMPLEMENTED(10 * major + minor >= MLPKIT_CUDA_MINIMUM, "linear_act_dropout: ", x.device(),
                                " has compute capability ", major, ".", minor, "; this build of mlpkit starts at ",
                                MLPKIT_CUDA_MINIMUM / 10, ".", MLPKIT_CUDA_MINIMUM % 10,
                                " and can be made with TORCH_CUDA_ARCH_LIST for 7.5 and newer");
  }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard device_;
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

inline c10::ScalarType compute_type(Dtype dtype) { return dtype == Dtype::float64 ? at::kDouble : at::kFloat; }

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? tensor.const_data_ptr() : nullptr;
}
inline void* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? tensor.mutable_data_ptr() : nullptr;
}
inline at::Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

// The two bit planes of a saved `bits` tensor; null where the op keeps none.
template <class Byte>
struct BitPlanes {
  Byte* keep;
  Byte* positive;
  BitPlanes(const LinearActDropout& op, Byte* bits)
      : keep(bits && op.keeps_bits() ? bits : nullptr),
        positive(bits && op.keeps_sign() ? bits + (op.keeps_bits() ? op.plane_bytes() : 0) : nullptr) {}
};

// Whether the kernels of cuda/linear_act_dropout_thin.h are allowed (ops/cuda_kernels.h) and can take this layer on the
// current device. What they save is what the other path saves: each can go backward from the other's forward pass.
bool takes_thin_kernels(const LinearActDropout& op);
ForwardResult thin_forward(const LinearActDropout& op, const CudaCall& call, const at::Tensor& x,
                           const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& slope,
                           const OptionalTensor& seed, double negative_slope, uint32_t stream, bool save);
BackwardResult thin_backward(const LinearActDropout& op, const CudaCall& call, const at::Tensor& dy,
                             const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& slope,
                             const at::Tensor& z, const at::Tensor& bits, double negative_slope,
                             std::array<bool, 4> needs);

}  // namespace mlpkit
