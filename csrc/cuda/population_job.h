// Many MLPs trained at once on a device, each by one block through whole epochs and each as if alone: what its kernels
// are given (cuda; no header of CUDA, since builds without it prepare jobs too).
//
// Blocks take members from a queue, longest first, and train each for a number of epochs: shuffle, steps, scores, best
// epoch and patience. What is multiplied lies in shared memory (population_plan.h); parameters, moments and the best
// epoch's parameters lie in global memory, where the few members under way stay in L2. A member's numbers depend on
// its own job and the tables alone: its plan and the order of all its sums follow from its own sizes, never from the
// launch that it is in. A step counts only if loss, gradients and everything that the update writes are finite.
#pragma once
#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"
#include "core/guarded_update.h"
#include "core/loss.h"
#include "core/population.h"
#include "cuda/population_plan.h"

namespace mlpkit::cuda {

struct MemberTable {        // all rows, once for all members
  const float* x;           // [rows, in]
  const BFloat16* rounded;  // the same, or nullptr where no member multiplies bfloat16
  const int32_t* classes;   // [rows], of losses of classes; of the others:
  const float* target;      // [rows, outputs]
  const float* weights;     // [rows] or nullptr where all weigh 1
};

struct MemberTask {
  Loss loss;
  float delta;  // huber's
  PopulationMetric metric;
};

struct MemberLayer {
  int in, out;
  uint32_t threshold;  // of the dropout that follows; 0 for the last layer
  float scale;
  int weight, bias, slope;  // where they begin in the parameters, in floats; slope: prelu's, or -1
};

enum class MemberStatus : int { alive, epochs, patience, diverged };

// What training has come to: in and out.
struct alignas(16) MemberNow {
  int64_t epoch, step, taken, skipped, skips_in_a_row, waited, best_epoch, stopped_step;
  double best, mark;
  MemberStatus status;
  MemberCause cause;
  int64_t epochs_of_launch;  // done by it
};

// What is done with a member; 16-byte words, since a block copies them into its shared memory.
struct alignas(16) MemberJob {
  MemberPlan plan;
  int layers;
  MemberLayer layer[kMemberLayers];
  Activation activation;
  float negative_slope;
  Optimizer optimizer;
  bool modest;  // no setting is beyond the bounds of core/population.h
  GuardedGroup group;
  double clip_norm, min_delta;  // clip_norm 0: none
  float certain, spread;        // of cross_entropy: 1 - label smoothing, label smoothing / classes
  uint64_t seed;
  int64_t patience, last_epoch;             // patience 0: none
  int epochs;                               // of this launch, at most
  int batch, rows, validation_rows, steps;  // steps: of an epoch
  const int32_t *row, *validation_row;      // [rows], [validation_rows]: which rows of the tables
  float *values, *first, *second, *best;    // [plan.floats]; first, second, best may be nullptr
  const double* factors;                    // of the learning rate, a step of this launch each, or nullptr for 1
  const double* powers;  // [.., 2]: beta1^t and beta2^t, of the first update of this launch and on, or nullptr
  double *train_loss, *validation_loss, *metric;  // [epochs]
  MemberNow* now;
  float* outputs;  // of predict_members
};

struct MemberLaunch {
  Dtype dtype;  // of what is multiplied: bfloat16 or float32
  MemberTask task;
  MemberTable table, validation;
  const MemberJob* jobs;  // [count], the longest first
  int count;
  uint32_t* next;    // 0
  int warps;         // of every job's plan
  int shared_bytes;  // of the largest
  int blocks;
  // Of each block: [2, most_rows] for the order of an epoch's rows, and [most_floats] for gradients that have no place
  // in shared memory.
  int32_t* order;
  float* gradients;
  int64_t most_rows, most_floats;
  double* columns;  // [blocks, 4, outputs]: scores by column
};

// Outputs of the members in eval, [rows, outputs] of each job; besides, its plan, layers, activation and values count.
struct MemberOutputs {
  Dtype dtype;
  const MemberJob* jobs;
  int count, warps, shared_bytes, blocks;
  uint32_t* next;     // 0
  MemberTable table;  // its x or rounded: [rows, in]
  int64_t rows;
};

}  // namespace mlpkit::cuda
