// GuardedUpdate's writing: by its own kernels, or by torch's (ops).
#include "ops/guarded_update_run.h"
#include "ops/torch_update.h"

namespace mlpkit {

RangeUpdate GuardedUpdate::range(const Run& run, const Chunk& chunk) const {
  const GuardedRow& row = rows_[chunk.row];
  const at::Tensor& gradient = run.gradients[chunk.row];
  const auto at_chunk = [&](const at::Tensor& tensor) -> void* {
    if (!tensor.defined()) return nullptr;
    return static_cast<char*>(tensor.unsafeGetTensorImpl()->mutable_data()) + chunk.begin * tensor.element_size();
  };
  RangeUpdate args{};
  args.settings = run.settings[chunk.row];
  args.factor = run.groups[row.group].maximize ? -run.outcome.factor : run.outcome.factor;
  args.dtype = dtype_of("guarded_update", "a parameter", row.p);
  args.gradient_dtype = dtype_of("guarded_update", "a gradient", gradient);
  args.copy_dtype = row.copy.defined() ? dtype_of("guarded_update", "a copy", row.copy) : args.dtype;
  args.count = chunk.count;
  args.p = at_chunk(row.p);
  args.g = static_cast<const char*>(gradient.const_data_ptr()) + chunk.begin * gradient.element_size();
  args.first = at_chunk(row.first);
  args.second = at_chunk(row.second);
  args.third = at_chunk(row.third);
  args.copy = at_chunk(row.copy);
  return args;
}

// Pass 2.
void GuardedUpdate::write(Run& run) {
  if (run.options.torch) return write_as_torch(run);
  run.largest.assign(chunks_.size(), {0, 0, 0, 0});
  const auto pass = [&](RangeUpdate::Part part) {
    run.squares.assign(chunks_.size(), 0);
    each_chunk([&](size_t i, const Chunk& chunk) {
      if (!run.active[chunk.row]) return;
      RangeUpdate args = range(run, chunk);
      std::array<double, 4> largest;
      args.part = part;
      args.largest = largest.data();
      args.squares = &run.squares[i];
      cpu::range_update(args);
      for (int k = 0; k < 4; ++k) raise_to(run.largest[i][k], largest[k]);
    });
  };
  if (kind_ != Optimizer::lamb) return pass(RangeUpdate::whole);
  pass(RangeUpdate::moments);
  std::vector<double> squares(rows_.size(), 0);
  for (size_t i = 0; i < chunks_.size(); ++i) squares[chunks_[i].row] += run.squares[i];
  for (size_t row = 0; row < rows_.size(); ++row) {
    if (!run.active[row]) continue;
    OptimizerSettingsOf<double>& s = run.settings[row];
    const double norm = std::sqrt(squares[row]);
    const bool normal = norm >= 0x1p-126 && s.rate > 0;
    s.unit = normal ? 1 / norm : 1;
    if (!normal) s.rate = s.lr;
  }
  pass(RangeUpdate::parameter);
}

// Group by group, as torch.optim goes; what is known of the results is what bounded() found.
void GuardedUpdate::write_as_torch(Run& run) {
  const double factor = run.outcome.factor;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!run.active[i]) continue;
    if (factor != 1) scale_gradient(run.gradients[i], factor);
    if (rows_[i].step.defined()) write_number(rows_[i].step, run.steps[i]);
  }
  for (size_t group = 0; group < run.groups.size(); ++group) {
    std::vector<const GuardedRow*> rows;
    std::vector<at::Tensor> gradients;
    std::vector<double> steps;
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (!run.active[i] || rows_[i].group != static_cast<int64_t>(group)) continue;
      rows.push_back(&rows_[i]);
      gradients.push_back(run.gradients[i]);
      steps.push_back(run.steps[i]);
    }
    if (!rows.empty()) torch_update(kind_, run.options.fused[group], run.groups[group], rows, gradients, steps);
  }
}

}  // namespace mlpkit
