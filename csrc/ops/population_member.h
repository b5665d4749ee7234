// One member of a population: its network, how it is trained, and all that its training remembers (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/activation.h"
#include "core/guarded_update.h"
#include "core/loss.h"
#include "core/norm.h"
#include "core/population.h"
#include "core/schedule.h"

namespace mlpkit {

// What a member is trained on and scored by; stored once for all members.
struct PopulationData {
  at::Tensor x;        // [rows, in] float32
  at::Tensor classes;  // [rows] int32, of cross_entropy and brier
  at::Tensor target;   // [rows, out] float32, of the other losses
  at::Tensor weights;  // [rows] float32, or undefined where all weigh 1
};

struct PopulationTask {
  Loss loss;
  double delta = 1.0;  // huber's
  PopulationMetric metric;
  bool higher_is_better() const { return metric == PopulationMetric::accuracy || metric == PopulationMetric::r2; }
};

// What may be changed between increments of training.
struct MemberRecipe {
  std::vector<double> dropout;  // one a hidden layer
  double lr = 1e-3, momentum = 0.0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0, l1 = 0.0;
  double clip_norm = 0.0;  // 0: none
  double label_smoothing = 0.0, min_delta = 0.0;
  bool nesterov = false;
  ScheduleSettings schedule;
  int64_t batch_size = 64, epochs = 30, patience = 0;  // patience 0: none

  // Whether all settings with this learning rate lie within the bounds of core/population.h.
  bool modest(double rate) const;
};

struct MemberNetwork {
  std::vector<int64_t> widths;  // in, hidden layers, out
  Activation activation = Activation::relu;
  double negative_slope = 0.01;
  Norm norm = Norm::none;
  double norm_eps = 1e-5, norm_momentum = 0.1;
  Optimizer optimizer = Optimizer::adam;
  bool with_momentum = false;  // sgd and rmsprop: the state has a buffer for it
  bool bfloat16 = false;
  uint64_t seed = 0;
};

struct MemberLayer {
  int64_t in, out;
  // Where they begin in the parameters (mean, variance: in the averages), or -1.
  int64_t weight, bias, norm_weight, norm_bias, slope, mean, variance;
  int64_t across = 0;  // of a layer in place (cpu/mlp_step.h), whose weight is [in, across]; 0: it is [out, in]
};

// What training has come to.
struct MemberProgress {
  int64_t epoch = 0, step = 0, taken = 0;  // epochs done, steps tried and taken
  int64_t skipped = 0, skips_in_a_row = 0, waited = 0, best_epoch = -1;
  int64_t stopped_step = -1;      // where it diverged
  double best = 0.0, mark = 0.0;  // of the metric: the best so far; what must be beaten by min_delta
  std::string status = "alive";   // alive, epochs, patience, diverged, dropped
  std::string cause;              // of divergence
  double seconds = 0.0;           // of the threads that trained it
  // By epoch. NaN where there is nothing to say.
  std::vector<double> train_loss, validation_loss, metric, lr;
};

class PopulationMember {
 public:
  // rows: int32, of the data's x; validation_rows: of the validation data's x, or undefined where it is not scored.
  PopulationMember(MemberNetwork network, MemberRecipe recipe, at::Tensor rows, at::Tensor validation_rows);

  const MemberNetwork network;
  MemberRecipe recipe;
  const at::Tensor rows, validation_rows;
  MemberProgress progress;
  std::vector<MemberLayer> layers;
  // All that is remembered beside `progress`, in one piece: parameters, first, second, averages, then the best epoch's
  // parameters and averages. Absent parts have no floats.
  at::Tensor state;
  int64_t parameters = 0, averages = 0;  // floats; every tensor begins at a multiple of 16

  bool validates() const { return validation_rows.defined() && validation_rows.numel() > 0; }
  bool has_first() const;
  bool has_second() const { return network.optimizer != Optimizer::sgd; }
  float* values() const { return state.mutable_data_ptr<float>(); }
  float* first() const { return has_first() ? values() + parameters : nullptr; }
  float* second() const { return has_second() ? values() + (has_first() ? 2 : 1) * parameters : nullptr; }
  float* running() const { return values() + moments_end(); }
  float* best_values() const { return values() + moments_end() + averages; }
  // The parameters and averages that predictions use: those of the best epoch where one was kept.
  const float* chosen_values(bool best) const { return best && keeps_best() ? best_values() : values(); }
  const float* chosen_running(bool best) const { return best && keeps_best() ? best_values() + parameters : running(); }
  bool keeps_best() const { return validates() && progress.best_epoch >= 0; }
  void keep_best();

  int64_t steps_per_epoch() const;
  double work_per_epoch() const;  // floating-point operations, and what a step costs beside them
  GuardedGroup group(double lr) const;
  OptimizerSettings settings(double lr) const;

 private:
  int64_t moments_end() const { return (1 + has_first() + has_second()) * parameters; }
  void lay_out();
};

}  // namespace mlpkit
