// The wide backward kernel for float16 (cuda).
#include "cuda/wide/backward.h"

namespace mlpkit::cuda::wide {

cudaError_t backward_fp16(const WideBackward& args, float* sums, int64_t stride, cudaStream_t stream) {
  return Backward<Half, WideSchedule::cooperative>::run(args, sums, stride, stream);
}

}  // namespace mlpkit::cuda::wide
