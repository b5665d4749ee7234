// The wide forward kernel for float16, cooperative (cuda).
#include "cuda/wide/forward.h"

namespace mlpkit::cuda::wide {

cudaError_t forward_fp16(const WideForward& args, cudaStream_t stream) {
  return Forward<Half, WideSchedule::cooperative>::run(args, stream);
}

}  // namespace mlpkit::cuda::wide
