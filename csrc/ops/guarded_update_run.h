// What the parts of GuardedUpdate share: one run's findings, and its work by chunks (ops).
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "ops/dtype.h"
#include "ops/guarded_update.h"

namespace mlpkit {

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
constexpr double kLargestDouble = std::numeric_limits<double>::max();

inline double read(const at::Tensor& number) {
  return number.scalar_type() == at::kDouble  ? *number.const_data_ptr<double>()
         : number.scalar_type() == at::kFloat ? *number.const_data_ptr<float>()
                                              : *number.const_data_ptr<int32_t>();
}
inline void write_number(const at::Tensor& number, double value) {
  if (number.scalar_type() == at::kDouble)
    *number.mutable_data_ptr<double>() = value;
  else if (number.scalar_type() == at::kFloat)
    *number.mutable_data_ptr<float>() = static_cast<float>(value);
  else
    *number.mutable_data_ptr<int32_t>() = static_cast<int32_t>(value);
  number.unsafeGetTensorImpl()->bump_version();
}

inline bool is_finite(const GuardedGroup& g) {
  for (const double x : {g.lr, g.beta1, g.beta2, g.eps, g.momentum, g.dampening, g.weight_decay, g.l1, g.trust})
    if (!std::isfinite(x)) return false;
  return true;
}

// NaN stays.
inline void raise_to(double& bound, double value) {
  if (!(value <= bound) && !std::isnan(bound)) bound = value;
}

struct GuardedUpdate::Run {
  const std::vector<GuardedGroup>& groups;
  const GuardedOptions& options;
  std::vector<at::Tensor> gradients;                  // by row, dense
  std::vector<uint8_t> active, looked, doubtful;      // by row; looked: its extents are read in this run
  std::vector<Extents> bounds;                        // by row: of what the step leaves, where it is not doubtful
  std::vector<OptimizerSettingsOf<double>> settings;  // by row
  std::vector<double> steps, squares_of_p;            // by row; steps: the count if this one is taken
  std::vector<RangeCensus> parts;                     // by chunk
  std::vector<std::array<RangeCensus, 4>> states;     // by chunk
  std::vector<std::array<double, 4>> largest;         // by chunk
  std::vector<double> squares;                        // by chunk: of lamb's direction
  GuardedOutcome outcome{false, GuardedReason::taken, 0, 0, -1, 0, false};
  double scale = 1, shrink = 1;
  bool overflowed = false;
};

template <class Work>
void GuardedUpdate::each_chunk(const Work& work) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (size_t i = units_[begin]; i < units_[end]; ++i) work(i, chunks_[i]);
  };
  const int64_t units = static_cast<int64_t>(units_.size()) - 1;
  if (units <= 1)
    run(0, units);
  else
    at::parallel_for(0, units, 1, run);
}

}  // namespace mlpkit
