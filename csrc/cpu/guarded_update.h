// The two passes of a guarded update over one range of a tensor: a census, then the update (cpu).
#pragma once
#include "core/dtype.h"
#include "core/guarded_update.h"
#include "cpu/capability.h"

namespace mlpkit {

struct RangeCensus {
  int64_t nan, inf, first;        // first: index of the first of them, or -1
  double absmax, sum_of_squares;  // of the finite elements; squares are summed in double
  bool negative;                  // whether a sign bit is set
};

struct CensusOfRange {
  Dtype dtype;
  const void* data;  // [count]
  int64_t count;
  double shrink;        // elements are multiplied by it before they are squared
  RangeCensus* result;  // overwritten
  void* to = nullptr;   // [count], gets every element times factor, rounded once; may be data
  double factor = 1;
};

struct RangeUpdate {
  enum Part { whole, moments, parameter };  // lamb's two parts: `moments` first
  Part part;
  bool dry;  // compute and report, store nothing
  OptimizerSettingsOf<double> settings;
  double factor;                            // the gradient is multiplied by it first
  Dtype dtype, gradient_dtype, copy_dtype;  // dtype: of p and state; float64 where the gradient is
  int64_t count;
  void* p;  // [count], like all below
  const void* g;
  void *first, *second, *third;  // nullptr where the optimizer has none
  void* copy;                    // p in copy_dtype, or nullptr
  double* largest;               // [4]: of p, first, second, third as computed, before they are rounded to dtype
  double* squares;               // moments: of the direction; overwritten
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(census_of_range, CensusOfRange)
MLPKIT_CPU_KERNEL(range_update, RangeUpdate)
