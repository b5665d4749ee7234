// The census of a contiguous range of elements (cpu).
#pragma once
#include "core/census.h"
#include "cpu/capability.h"

namespace mlpkit {

struct CensusResult {
  CensusCounts counts;
  double absmax, min_nonzero;         // of the finite elements; 0 where there are none
  int64_t histogram[kHistogramBins];  // of the exponents of finite non-zero elements; zeros unless asked for
};

struct Census {
  Dtype dtype;
  const void* data;  // [count]
  int64_t count;
  bool histogram;
  CensusResult* result;  // overwritten
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(census, Census)
