// One optimizer update of one tensor in place, and what must be known before it may be made (cpu).
#pragma once
#include "core/optimizer.h"
#include "cpu/capability.h"

namespace mlpkit {

struct Update {
  OptimizerSettings settings;
  float scale;  // the gradient is multiplied by it first (clipping)
  int64_t count;
  float* p;                  // [count]
  const float* g;            // [count]
  float* first;              // [count] or nullptr: momentum, exp_avg
  float* second;             // [count] or nullptr: exp_avg_sq, square_avg
  float* largest = nullptr;  // as Inspect's, of what is written; or nullptr
};

struct Inspect {        // results are added to what is there
  const float* p;       // [count]
  const float* first;   // [count] or nullptr
  const float* second;  // [count] or nullptr
  int64_t count;
  float* largest;  // largest |p|, |first|, |second|; NaN counts as larger than Inf and stays
  bool* negative;  // whether an element of second is below zero
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(update, Update)
MLPKIT_CPU_KERNEL(inspect, Inspect)
