// Trains one member on one thread, epoch by epoch, in memory that the thread lends to member after member (ops).
#pragma once
#include <optional>

#include "cpu/population.h"
#include "ops/mlp_step_work.h"
#include "ops/population_member.h"

namespace mlpkit {

// What a thread works in; nothing in it outlives a step but the order of an epoch's rows.
struct PopulationWorkspace {
  AlignedMemory gradients, weights, activations, scratch, batch, saved, scores;
  std::vector<int32_t> order;
  std::vector<NormWork> norms;
  std::vector<double> values, squares;
};

class MemberRun {
 public:
  MemberRun(const PopulationTask& task, const PopulationData& data, const PopulationData& validation,
            PopulationMember& member, PopulationWorkspace& work);
  // One epoch, its scores, and whether the member goes on: it stops by itself, or at the last epoch. Returns the number
  // of steps.
  int64_t epoch();

 private:
  struct Verdict {  // on a step: none where it was taken
    MemberCause cause;
    double loss, weight;
  };

  void lay_out();
  void lay_out_norm(size_t i, const MemberLayer& from, StepLayer& layer);
  void lay_out_activations();
  void set_weights();
  StepLoss gather(const int32_t* rows, int64_t count);
  Verdict step(const int32_t* rows, int64_t count, double lr);
  double forward_and_backward(const int32_t* rows, int64_t count, const StepLoss& loss);
  void run_panels(const int32_t* rows, int64_t count, const StepLoss& loss, int64_t from, int64_t until);
  double gradient_norm(const int32_t* rows, int64_t count);
  bool update(double scale, double largest_gradient, double lr);
  bool averages_finite() const;
  void move_averages();
  void diverge(MemberCause cause, int64_t step);
  void score();
  void judge();

  const PopulationTask& task_;
  const PopulationData &data_, &validation_;
  PopulationMember& member_;
  PopulationWorkspace& work_;
  MlpStepKernels kernels_;
  std::vector<StepLayer> layers_;
  std::vector<StepGradient> pieces_;
  std::vector<float*> norm_gradients_;  // weight and bias of each layer, or nullptr
  std::vector<float*> slope_gradients_;
  int64_t batch_, scratch_floats_ = 0;
  bool by_panel_ = false;
  double counted_ = 0.0, loss_scale_ = 1.0;
  float largest_ = 0.f;  // magnitude in parameters and state
  bool negative_ = false;
};

}  // namespace mlpkit
