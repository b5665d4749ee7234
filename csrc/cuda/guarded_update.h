// The guarded update of a list of tensors: a census that decides, then the update or nothing (cuda).
//
// Nothing is read back, and what lasts from step to step stays on the device: the table of tensors, what is known of
// their magnitudes, step counts, the loss scale, a log of the skips. A launch carries the addresses of the gradients
// and the settings in its arguments, so that a step copies nothing and a captured graph holds all it needs.
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtype.h"
#include "core/guarded_update.h"

namespace mlpkit::cuda {

// What fits into the arguments of a launch (4 KB); more of them come as arrays on the device.
constexpr int kGuardedGradients = 320, kGuardedGroups = 8;
// Rows of more chunks than this are added up by a warp; by a block.
constexpr int64_t kGuardedByWarp = 16, kGuardedByBlock = 512;
constexpr int kGuardedSkips = 32, kGuardedSkip = 12;  // the last skips in the log; numbers of one

// A row of the table. Rows lie by falling count, so that the long ones come first.
struct alignas(16) GuardedTensor {
  void *p, *first, *second, *third;  // [count], of dtype; nullptr where the optimizer keeps none
  void* copy;                        // [count], of copy_dtype: a float32 parameter in bfloat16 or float16
  void* step;                        // [1], steps taken: float, or double where wide_step; or nullptr
  int64_t count, first_chunk;        // its chunks are numbered from here
  int32_t index;                     // its row of census, bounds and the decision
  int32_t group;
  Dtype dtype, gradient_dtype, copy_dtype;  // gradient_dtype is float64 where dtype is
  int32_t wide_step;
};

// A parameter group; rate: its learning rate on the device, or nullptr.
struct GuardedGroupOnDevice {
  GuardedGroup settings;
  const float* rate;
};

struct GuardedDecision {
  double taken, reason, norm, factor, row, rows;  // as in mlpkit.ops.guarded_update; taken 2: to be tried yet
};

// What the blocks of a census have seen of a row: zeros between launches. Maxima and sums of integers alone: these do
// not depend on the order.
struct GuardedTally {
  uint64_t top;       // largest finite magnitude of the gradient, the bits of a double
  uint64_t from_end;  // 2^62 less the index of the first Inf or NaN
  uint64_t nan, inf;
  uint64_t seen[4];  // of p, first, second, third: the bits of a double, of NaN where they cannot be bounded
};

// What a row is updated by.
struct GuardedRowSettings {
  alignas(16) OptimizerSettingsOf<float> single;
  alignas(16) OptimizerSettingsOf<double> wide;
  alignas(16) double squares_of_p, doubtful;
};

struct GuardedUpdateArgs {  // all pointers are the device's
  Optimizer kind;
  bool force;
  bool tries;  // updates in doubt are tried by a launch of their own; otherwise by the block that decides
  bool plain;  // parameters, state and gradients are float32, and there are no copies
  GuardedScale rule;
  double clip;
  int32_t rows, by_block, by_warp;  // rows that a block adds up; and those that a block or a warp does
  int32_t chunks;
  int64_t chunk;  // elements
  const GuardedTensor* table;
  const int32_t* row_of_chunk;
  float* scale;                        // [1] or nullptr
  int32_t* clean;                      // [1] or nullptr
  float* found;                        // [1] or nullptr
  GuardedDecision* decision;           // [1]
  double* census;                      // [rows, 5]: NaN, Inf, first of them, absmax, sum of squares
  double* bounds;                      // [rows, 4]: largest p, first, second, third; NaN first: not known; kept
  double* log;                         // steps, skips, then the last skips; kept; or nullptr
  double* parts;                       // [chunks, 2], scratch
  GuardedTally* tally;                 // [rows], zeros
  GuardedRowSettings* settings;        // [rows], scratch
  uint32_t* begun;                     // [rows] by index, kept: whether a row without a step count has taken a step
  uint32_t* finished;                  // [2], zeros
  const void* const* gradients;        // [rows] by the table, or nullptr: `gradient`
  const GuardedGroupOnDevice* groups;  // or nullptr: `group`
  const void* gradient[kGuardedGradients];  // nullptr: the row takes no part
  GuardedGroupOnDevice group[kGuardedGroups];
};
static_assert(sizeof(GuardedUpdateArgs) <= 4096, "arguments of a kernel have 4 KB");

// Two launches, lamb three, and one more where `tries`.
cudaError_t guarded_update(const GuardedUpdateArgs&, cudaStream_t);
cudaError_t guarded_census(const GuardedUpdateArgs&, cudaStream_t);  // the first of them

// Copies words to the device by the arguments of launches: nothing of the host's is read later, so that a captured
// graph may hold it.
constexpr int kGuardedWords = 440;
cudaError_t guarded_upload(uint64_t* to, const uint64_t* words, int64_t count, cudaStream_t);
// row_of_chunk from the table.
cudaError_t guarded_number_chunks(const GuardedTensor* table, int32_t rows, int32_t chunks, int32_t* row_of_chunk,
                                  cudaStream_t);

}  // namespace mlpkit::cuda
