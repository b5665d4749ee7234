// The wide forward kernel for bfloat16, cooperative (cuda).
#include "cuda/wide/forward.h"

namespace mlpkit::cuda::wide {

cudaError_t forward_bf16(const WideForward& args, cudaStream_t stream) {
  return Forward<BFloat16, WideSchedule::cooperative>::run(args, stream);
}

}  // namespace mlpkit::cuda::wide
