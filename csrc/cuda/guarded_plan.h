// How the tensors of a guarded update are laid out for the device, made once for a list of them (cuda; host).
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "cuda/guarded_update.h"

namespace mlpkit::cuda {

struct GuardedPlan {
  std::vector<GuardedTensor> table;
  int64_t chunk = 0;
  int32_t chunks = 0, by_block = 0, by_warp = 0;
  bool plain = true;    // as in GuardedUpdateArgs
  bool narrow = false;  // something is float16, for which bounds often prove nothing
};

// Short chunks give every multiprocessor of a device some of a small list; long ones keep few sums for the last block.
inline int64_t guarded_chunk(int64_t elements) {
  int64_t chunk = 4096;
  while (chunk < 32768 && elements / chunk > 16384) chunk *= 2;
  return chunk;
}

// rows: by index, all fields filled in but first_chunk. chunk: 0, or a multiple of 8. More than 2^31 chunks: chunks is
// negative.
inline GuardedPlan plan_guarded(std::vector<GuardedTensor> rows, int64_t chunk = 0) {
  GuardedPlan plan;
  int64_t elements = 0, chunks = 0;
  for (const GuardedTensor& row : rows) {
    elements += row.count;
    plan.plain = plan.plain && row.dtype == Dtype::float32 && row.gradient_dtype == Dtype::float32 && !row.copy;
    plan.narrow = plan.narrow || row.dtype == Dtype::float16 || (row.copy && row.copy_dtype == Dtype::float16);
  }
  plan.chunk = chunk ? chunk : guarded_chunk(elements);
  std::stable_sort(rows.begin(), rows.end(),
                   [](const GuardedTensor& a, const GuardedTensor& b) { return a.count > b.count; });
  for (GuardedTensor& row : rows) {
    const int64_t own = (row.count + plan.chunk - 1) / plan.chunk;
    row.first_chunk = chunks;
    chunks += own;
    plan.by_block += own > kGuardedByBlock;
    plan.by_warp += own > kGuardedByWarp;
  }
  plan.chunks = chunks <= INT32_MAX ? static_cast<int32_t>(chunks) : -1;
  plan.table = std::move(rows);
  return plan;
}

// Whether updates may often be in doubt, so that a launch of their own tries them: one block is slow at it.
inline bool guarded_tries(const GuardedPlan& plan, Optimizer kind, const GuardedGroup* groups, size_t count) {
  bool tries = plan.narrow;
  for (size_t i = 0; i < count; ++i)
    tries = tries || (kind != Optimizer::sgd && kind != Optimizer::lars && !(groups[i].eps >= 0x1p-126));
  return tries;
}

}  // namespace mlpkit::cuda
