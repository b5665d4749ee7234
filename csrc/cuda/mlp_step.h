// A training step of a small MLP in three launches: the pass over all rows (forward, loss, backward, gradients of the
// weights, a part from each block), the sum of the parts with the inspection of everything, and the update or nothing
// (cuda). The pass alone, without gradients, is inference, and with dropout the forward half of training.
//
// Products take bf16 or f16 and accumulate in fp32; bias, activation, dropout, loss and update are fp32. Nothing is
// added in an order that depends on timing: two runs give the same bits. Seed, step counts and loss scale are read and
// moved on the device, so that a captured graph goes on where it stopped.
#pragma once
#include <cuda_runtime_api.h>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"
#include "core/loss.h"
#include "core/optimizer.h"
#include "cuda/mlp_plan.h"

namespace mlpkit::cuda {

struct MlpLayer {
  const float* weight;  // [out, in]
  const float* bias;    // [out] or nullptr
  int in, out;
  uint32_t threshold;  // of the dropout that follows; 0 for the last layer
  float scale;
};

struct MlpLoss {
  Loss kind;
  bool mean;
  float slope_scale;  // of the slopes: 1, or 1 / rows, or 1 / (rows * outputs)
  float delta;
  float certain, spread;   // of cross_entropy: 1 - label smoothing, label smoothing / classes
  const int64_t* classes;  // [rows]; of the other losses:
  const float* target;     // [rows, out]
  int64_t ignore_index;
  const float* by_class;  // [out] or nullptr
};

// What a block tells of its rows: the loss before any scale, the weight of the rows that count, and whether a class is
// out of range.
struct MlpValues {
  double loss, counted, out_of_range;
};

struct MlpPass {
  Dtype dtype;  // bfloat16 or float16: of what is multiplied
  Activation activation;
  float negative_slope;
  int layers;
  MlpLayer layer[kMlpLayers];
  int64_t rows;
  const void* x;  // [rows, in]: float32, or dtype
  bool x_is_single;
  const int64_t* seed;  // seed and offset, or nullptr without dropout
  void* y;              // [rows, out] of dtype, or nullptr
  bool has_loss;
  MlpLoss loss;
  const float* loss_scale;  // or nullptr for 1
  float* parts;             // [blocks, plan.floats], or nullptr without gradients
  MlpValues* values;        // [blocks], with a loss
};

struct MlpParameter {
  float *value, *first, *second, *step;  // the last three may be nullptr
  int64_t gradient;                      // where its gradient begins, a multiple of four
  int count, group;
};

struct MlpGroup {
  double weight_decay, momentum, dampening, beta1, beta2, eps;
  bool nesterov;
  double lr;
  const float* lr_on_device;  // takes the place of lr where it is not nullptr
};

constexpr int kMlpParameters = 2 * kMlpLayers, kMlpGroups = 4;

// What the pass found, for the update, and what the caller may read. taken: 1, or 0 where nothing was changed;
// overflowed: 1 where gradients were not finite while the loss was.
struct MlpControl {
  double loss, norm, scale, taken, overflowed;
  float steps[kMlpParameters];
};

struct MlpUpdate {
  int layers;
  MlpLayer layer[kMlpLayers];
  int64_t dweight[kMlpLayers], dbias[kMlpLayers];
  int parts, parameters, groups;
  int64_t floats;  // of a part
  int64_t quads;   // of all gradients: groups of four floats
  int64_t rows, outputs;
  bool mean, by_counted;  // of the loss
  const float* part;
  const MlpValues* values;
  MlpParameter parameter[kMlpParameters];
  int weight_of[kMlpLayers], bias_of[kMlpLayers];  // parameters; -1 without
  MlpGroup group[kMlpGroups];
  Optimizer optimizer;
  double clip_norm;  // 0: none
  float* gradients;  // [quads, 4]
  double* squares;   // [reduce blocks]
  uint32_t* bad;     // likewise: state or parameters that an update could overflow
  MlpControl* control;
  int64_t* seed;  // its offset moves on by one
  float* loss_scale;
  uint32_t* clean_steps;
  float growth, backoff, floor, ceiling;
  int growth_interval;
};

// How many numbers `squares` and `bad` hold.
MLPKIT_HD int64_t reduce_blocks(int64_t floats) { return (floats + 127) / 128; }

cudaError_t mlp_pass(const MlpPass&, const MlpPlan&, cudaStream_t);
cudaError_t mlp_update(const MlpUpdate&, cudaStream_t);

}  // namespace mlpkit::cuda
