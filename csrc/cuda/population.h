// The launches of population_job.h (cuda). Each queues one kernel; `next` must be 0 by then.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/population_job.h"

namespace mlpkit::cuda {

cudaError_t train_members(const MemberLaunch&, cudaStream_t);
cudaError_t predict_members(const MemberOutputs&, cudaStream_t);

}  // namespace mlpkit::cuda
