// What a population's members need beside the training step of cpu/mlp_step.h: the order of an epoch's rows (cpu).
#pragma once
#include "core/shuffle.h"
#include "cpu/capability.h"

namespace mlpkit {

struct ShuffleRows {
  uint64_t seed;
  uint32_t epoch;
  int64_t count;   // below 2^31
  int32_t* order;  // [count]: brought into the epoch's order in place
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(shuffle_rows, ShuffleRows)
