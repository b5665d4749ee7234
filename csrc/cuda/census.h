// The census of a list of tensors (cuda): core/census.h's counts, by integers alone, so that no order shows in them.
#pragma once
#include <cuda_runtime_api.h>

#include "core/census.h"
#include "core/dtype.h"

namespace mlpkit::cuda {

constexpr int kCensusTensors = 128;      // of a launch, in its arguments
constexpr int64_t kCensusChunk = 32768;  // elements of one tensor that a block looks at in one go

struct CensusTensor {
  const void* data;  // [count], contiguous
  int64_t count;
  int32_t first_chunk;
  Dtype dtype;
};

// What the blocks have seen of a tensor; zeros before the launch.
struct CensusTally {
  uint64_t counts[7];  // as CensusCounts, up to `first`
  uint64_t from_end;   // 2^62 less the index of the first NaN or Inf
  uint64_t top;        // largest finite magnitude, the bits of a double
  uint64_t unbottom;   // smallest non-zero one, these bits inverted
};

struct CensusArgs {
  int32_t tensors, chunks;
  bool histogram;
  int64_t* counts;     // [tensors, 8]
  double* extremes;    // [tensors, 2]
  uint64_t* bins;      // [tensors, kHistogramBins], zeros, with a histogram
  CensusTally* tally;  // [tensors]
  uint32_t* finished;  // [1], zero
  CensusTensor tensor[kCensusTensors];
};
static_assert(sizeof(CensusArgs) <= 4096, "arguments of a kernel have 4 KB");

// One launch. first_chunk and chunks are filled in here.
cudaError_t census(CensusArgs args, cudaStream_t);

}  // namespace mlpkit::cuda
