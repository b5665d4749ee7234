// A member's outputs in eval, and what they score (ops).
#pragma once
#include "ops/population_run.h"

namespace mlpkit {

struct MemberScores {
  double loss, metric;
};

class MemberScorer {
 public:
  // best: with the weights of the best epoch, where one was kept.
  MemberScorer(const PopulationTask& task, const PopulationMember& member, bool best, PopulationWorkspace& work);
  MemberScores scores(const PopulationData& data, const at::Tensor& rows);
  // All rows of x [rows, in]: outputs [rows, out].
  void outputs(const float* x, int64_t rows, float* to);

 private:
  struct Sums;
  void set_norms(const float* running);
  double forward(const float* x, const int32_t* index, int64_t count, const StepLoss& loss, float* to);
  void add_metric(const StepLoss& loss, int64_t count, const float* outputs, Sums& sums) const;
  double metric(const Sums& sums, double loss) const;

  const PopulationTask& task_;
  const PopulationMember& member_;
  PopulationWorkspace& work_;
  MlpStepKernels kernels_;
  std::vector<StepLayer> layers_;
  std::vector<float> norms_;
  float *scratch_ = nullptr, *outputs_ = nullptr, *target_ = nullptr;
};

}  // namespace mlpkit
