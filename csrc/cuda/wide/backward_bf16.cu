// The wide backward kernel for bfloat16 (cuda).
#include "cuda/wide/backward.h"

namespace mlpkit::cuda::wide {

cudaError_t backward_bf16(const WideBackward& args, float* sums, int64_t stride, cudaStream_t stream) {
  return Backward<BFloat16, WideSchedule::cooperative>::run(args, sums, stride, stream);
}

}  // namespace mlpkit::cuda::wide
