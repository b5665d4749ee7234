// The launch function of csrc/cuda/census.h with flat arguments, for ctypes (emulation).
#include "cuda/census.h"

using namespace mlpkit;

extern "C" {

int64_t emulate_bytes_of_tally() { return sizeof(cuda::CensusTally); }

int emulate_census(int tensors, const void* const* data, const int64_t* sizes, const int* dtypes, int histogram,
                   int64_t* counts, double* extremes, uint64_t* bins, void* tally, uint32_t* finished) {
  cuda::CensusArgs args{};
  args.tensors = tensors;
  args.histogram = histogram != 0;
  args.counts = counts;
  args.extremes = extremes;
  args.bins = bins;
  args.tally = static_cast<cuda::CensusTally*>(tally);
  args.finished = finished;
  for (int i = 0; i < tensors; ++i) args.tensor[i] = {data[i], sizes[i], 0, static_cast<Dtype>(dtypes[i])};
  return cuda::census(args, nullptr);
}

}  // extern "C"
