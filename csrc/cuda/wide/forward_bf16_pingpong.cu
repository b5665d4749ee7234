// The wide forward kernel for bfloat16, pingpong (cuda).
#include "cuda/wide/forward.h"

namespace mlpkit::cuda::wide {

cudaError_t forward_bf16_pingpong(const WideForward& args, cudaStream_t stream) {
  return Forward<BFloat16, WideSchedule::pingpong>::run(args, stream);
}

}  // namespace mlpkit::cuda::wide
