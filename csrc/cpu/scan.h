// The quick look at a contiguous range: its extremes and zeros (cpu). A census says the rest where it is bad.
#pragma once
#include "core/census.h"
#include "cpu/capability.h"

namespace mlpkit {

struct ScanResult {
  double absmax, absmin;  // of all elements; 0 where there are none; meaningless where there is NaN or Inf
  int64_t zero;
  bool finite;
};

struct Scan {
  Dtype dtype;
  const void* data;  // [count]
  int64_t count;
  ScanResult* result;  // overwritten
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(scan, Scan)
