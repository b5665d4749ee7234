// Which wide kernel takes a layer (cuda). Built without CUTLASS or without code for compute capability 9.0, none does.
#include "cuda/wide_linear.h"

#include "cuda/column_sums.h"
#include "cuda/device.h"

namespace mlpkit::cuda {

#ifdef MLPKIT_WIDE_KERNELS
namespace wide {  // one file each
cudaError_t forward_bf16(const WideForward&, cudaStream_t);
cudaError_t forward_bf16_pingpong(const WideForward&, cudaStream_t);
cudaError_t forward_fp16(const WideForward&, cudaStream_t);
cudaError_t backward_bf16(const WideBackward&, float* sums, int64_t stride, cudaStream_t);
cudaError_t backward_fp16(const WideBackward&, float* sums, int64_t stride, cudaStream_t);
}  // namespace wide
#endif

namespace {

int64_t tiles(int64_t size) { return (size + kMaskTile - 1) / kMaskTile; }

}  // namespace

bool wide_built() {
#ifdef MLPKIT_WIDE_KERNELS
  return true;
#else
  return false;
#endif
}

// Below 512 the product is short, and what is beside it counts; TMA wants rows of whole 16 bytes.
bool wide_takes(Dtype dtype, Activation activation, int64_t rows, int64_t cols, int64_t depth) {
  constexpr int64_t least = 512, unit = 8;
  return wide_built() && (dtype == Dtype::bfloat16 || dtype == Dtype::float16) && activation != Activation::prelu &&
         rows > 0 && rows <= INT32_MAX - kMaskTile && cols >= least && cols % unit == 0 &&
         cols <= INT32_MAX - kMaskTile && depth >= least && depth % unit == 0 && depth <= INT32_MAX &&
         device::capability() == 90;
}

int64_t wide_scratch_elements(int64_t rows, int64_t cols) {
  return column_sums_elements(tiles(rows), tiles(cols) * kMaskTile);
}

cudaError_t wide_forward(const WideForward& args, cudaStream_t stream) {
#ifdef MLPKIT_WIDE_KERNELS
  if (args.dtype == Dtype::float16) return wide::forward_fp16(args, stream);
  if (args.dtype != Dtype::bfloat16) return cudaErrorInvalidValue;
  return args.schedule == WideSchedule::pingpong ? wide::forward_bf16_pingpong(args, stream)
                                                 : wide::forward_bf16(args, stream);
#else
  static_cast<void>(args), static_cast<void>(stream);
  return cudaErrorNotSupported;
#endif
}

cudaError_t wide_backward(const WideBackward& args, cudaStream_t stream) {
#ifdef MLPKIT_WIDE_KERNELS
  float* sums = args.dbias ? static_cast<float*>(args.scratch) : nullptr;
  const int64_t stride = tiles(args.cols) * kMaskTile;
  cudaError_t error = cudaErrorInvalidValue;
  if (args.dtype == Dtype::bfloat16) error = wide::backward_bf16(args, sums, stride, stream);
  if (args.dtype == Dtype::float16) error = wide::backward_fp16(args, sums, stride, stream);
  if (error != cudaSuccess || !sums) return error;
  return column_sums({tiles(args.rows), args.cols, stride, args.dtype, sums, args.dbias, false}, stream);
#else
  static_cast<void>(args), static_cast<void>(stream);
  return cudaErrorNotSupported;
#endif
}

}  // namespace mlpkit::cuda
