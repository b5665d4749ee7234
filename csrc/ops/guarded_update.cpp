// GuardedUpdate on the CPU: census, decision, proof, update; chunks of fixed size, so that threads change no bit (ops).
#include <ATen/ops/empty_like.h>

#include "ops/guarded_update_run.h"

namespace mlpkit {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements of one tensor that are summed in one go
constexpr int64_t kUnit = 1 << 16;   // elements that are worth another thread

void check_number(const char* name, const at::Tensor& number, at::ScalarType dtype) {
  if (number.defined())
    TORCH_CHECK_VALUE(number.is_cpu() && number.numel() == 1 && number.scalar_type() == dtype, "guarded_update: ", name,
                      " is ", number.scalar_type(), " of shape ", number.sizes(), " on ", number.device(),
                      "; it must be one ", dtype == at::kInt ? "int32" : "float32", " number on cpu");
}

void check_row(const GuardedRow& row) {
  const at::Tensor& p = row.p;
  const Dtype dtype = dtype_of("guarded_update", "a parameter", p);
  TORCH_CHECK_VALUE(p.is_cpu(), "guarded_update: a parameter is on ", p.device(), "; this kernel is the CPU's");
  TORCH_CHECK_VALUE(p.is_non_overlapping_and_dense(), "guarded_update: a parameter of shape ", p.sizes(),
                    " and strides ", p.strides(), " has gaps or overlaps in memory; make it contiguous");
  for (const at::Tensor* state : {&row.first, &row.second, &row.third}) {
    if (!state->defined()) continue;
    TORCH_CHECK_VALUE(state->sizes() == p.sizes() && same_layout(*state, p.strides()) && state->is_cpu() &&
                          state->scalar_type() == p.scalar_type(),
                      "guarded_update: a state tensor is ", state->scalar_type(), " of shape ", state->sizes(),
                      " and strides ", state->strides(), "; its parameter is ", p.scalar_type(), ", ", p.sizes(), ", ",
                      p.strides());
  }
  if (row.copy.defined())
    TORCH_CHECK_VALUE(
        dtype == Dtype::float32 && row.copy.sizes() == p.sizes() && same_layout(row.copy, p.strides()) &&
            row.copy.is_cpu() && (row.copy.scalar_type() == at::kHalf || row.copy.scalar_type() == at::kBFloat16),
        "guarded_update: a copy is ", row.copy.scalar_type(), " of shape ", row.copy.sizes(),
        "; it must be the float16 or bfloat16 form of a float32 parameter, here ", p.scalar_type(), ", ", p.sizes());
  if (row.step.defined())
    TORCH_CHECK_VALUE(row.step.is_cpu() && row.step.numel() == 1 &&
                          (row.step.scalar_type() == at::kFloat || row.step.scalar_type() == at::kDouble),
                      "guarded_update: a step count is ", row.step.scalar_type(), " of shape ", row.step.sizes(),
                      "; it must be one float32 or float64 number");
}

// The gradient as it lies in its parameter's order, checked.
at::Tensor dense(const at::Tensor& gradient, const GuardedRow& row) {
  TORCH_CHECK_VALUE(gradient.layout() == at::kStrided && gradient.is_cpu() && gradient.sizes() == row.p.sizes(),
                    "guarded_update: a gradient is ", gradient.layout(), " on ", gradient.device(), " of shape ",
                    gradient.sizes(), "; it must be dense like its parameter, on cpu, ", row.p.sizes());
  const Dtype dtype = dtype_of("guarded_update", "a gradient", gradient);
  TORCH_CHECK_TYPE((dtype == Dtype::float64) == (row.p.scalar_type() == at::kDouble), "guarded_update: a gradient is ",
                   gradient.scalar_type(), ", its parameter ", row.p.scalar_type());
  if (same_layout(gradient, row.p.strides()) && !gradient.is_neg()) return gradient;
  at::Tensor copy = at::empty_like(row.p, row.p.options().dtype(gradient.scalar_type()).requires_grad(false));
  return copy.copy_(gradient);
}

}  // namespace

bool same_layout(const at::Tensor& tensor, at::IntArrayRef strides) {
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) != strides[i]) return false;
  return true;
}

Seen seen(const GuardedRow& row) {
  Seen result;
  const auto tensors = row.state();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i]->defined()) continue;
    result.data[i] = tensors[i]->const_data_ptr();
    if (!tensors[i]->is_inference())
      result.version[i] = tensors[i]->unsafeGetTensorImpl()->version_counter().current_version();
  }
  return result;
}

GuardedUpdate::GuardedUpdate(Optimizer kind, std::vector<GuardedRow> rows) : kind_(kind), rows_(std::move(rows)) {
  int64_t unit = kUnit;
  for (size_t i = 0; i < rows_.size(); ++i) {
    check_row(rows_[i]);
    const int64_t count = rows_[i].p.numel();
    for (int64_t begin = 0; begin < count; begin += kChunk) {
      if (unit >= kUnit) {
        units_.push_back(chunks_.size());
        unit = 0;
      }
      chunks_.push_back({static_cast<int64_t>(i), begin, std::min(kChunk, count - begin)});
      unit += chunks_.back().count;
    }
  }
  units_.push_back(chunks_.size());
  seen_.resize(rows_.size());
  extents_.assign(rows_.size(), {kUnknown, 0, 0, 0});
}

namespace {

// What bounds a row that torch has updated: its roundings add up from step to step.
Extents after_torch(const Extents& exact) {
  const auto wider = [](double bound) { return bound * (1 + 0x1p-20) + 0x1p-140; };
  return {wider(exact.p), wider(exact.first), wider(exact.second), wider(exact.third)};
}

}  // namespace

// What is known of the rows from now on, counts and version counters.
void GuardedUpdate::finish(Run& run) {
  for (size_t row = 0; row < rows_.size(); ++row)
    if (run.active[row]) extents_[row] = run.options.torch ? after_torch(run.bounds[row]) : Extents{};
  for (size_t i = 0; i < run.largest.size(); ++i) {
    if (!run.active[chunks_[i].row]) continue;
    Extents& e = extents_[chunks_[i].row];
    double* bounds[] = {&e.p, &e.first, &e.second, &e.third};
    for (int k = 0; k < 4; ++k) raise_to(*bounds[k], run.largest[i][k]);
  }
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!run.active[i]) continue;
    GuardedRow& row = rows_[i];
    row.fresh = false;
    for (const at::Tensor* tensor : {&row.p, &row.first, &row.second, &row.third, &row.copy})
      if (tensor->defined() && !tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
    if (row.step.defined()) write_number(row.step, run.steps[i]);
    seen_[i] = seen(row);
  }
}

namespace {

// Where torch's loops over a tensor end in numbers that are rounded one by one depends on its layout: theirs must
// agree. Its fused kernels know of no layout, and get what they pair correctly.
bool as_torch_takes(const at::Tensor& gradient, const at::Tensor& dense, const GuardedRow& row, bool fused) {
  return (fused || gradient.is_same(dense)) && gradient.scalar_type() == row.p.scalar_type() && !row.copy.defined() &&
         row.p.element_size() >= 4;
}

}  // namespace

// torch's fused sgd takes a group's momentum buffers for empty together, or refuses.
bool GuardedUpdate::begin_together(const std::vector<uint8_t>& active, const std::vector<uint8_t>& fused) const {
  for (size_t group = 0; group < fused.size(); ++group) {
    int64_t fresh = 0, all = 0;
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (!active[i] || rows_[i].group != static_cast<int64_t>(group)) continue;
      ++all;
      fresh += rows_[i].fresh;
    }
    if (fused[group] && fresh != 0 && fresh != all) return false;
  }
  return true;
}

GuardedOutcome GuardedUpdate::run(const std::vector<at::Tensor>& gradients, const std::vector<GuardedGroup>& groups,
                                  const GuardedOptions& options) {
  check_number("scale", options.scale, at::kFloat);
  check_number("found_inf", options.found, at::kFloat);
  check_number("clean_steps", options.clean, at::kInt);
  Run run{groups, options, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const size_t count = rows_.size();
  run.gradients.resize(count);
  run.active.assign(count, 0);
  run.looked.assign(count, 0);
  run.doubtful.assign(count, 0);
  run.bounds.resize(count);
  run.settings.resize(count);
  run.steps.assign(count, 0);
  for (size_t i = 0; i < count; ++i) {
    if (!gradients[i].defined()) continue;
    run.active[i] = 1;
    run.gradients[i] = dense(gradients[i], rows_[i]);
    if (options.torch && !as_torch_takes(gradients[i], run.gradients[i], rows_[i], options.fused[rows_[i].group]))
      return {false, GuardedReason::update, 0, 0, static_cast<int64_t>(i), 0, false};
    run.looked[i] = std::isnan(extents_[i].p) || !(seen_[i] == seen(rows_[i]));
  }
  if (options.scale.defined()) run.scale = read(options.scale);
  if (options.torch && !begin_together(run.active, options.fused))
    return {false, GuardedReason::update, 0, 0, -1, 0, false};
  unscaled_by_ = 1;
  if (!options.unscale)
    take_census(run, 1.0, 1);
  else if (!unscale(run, gradients))
    return {false, GuardedReason::scale, 0, 0, -1, 0, false};
  look(run, run.looked);
  const bool decided = decide(run);
  const bool proven = (decided || options.force) && prove(run);
  run.outcome.taken = (decided && proven) || options.force;
  if (run.outcome.taken) {
    write(run);
    finish(run);
  }
  if (options.found.defined()) write_number(options.found, run.overflowed ? 1 : 0);
  if (options.scale.defined() && options.rule.interval > 0) {
    const double clean = options.clean.defined() ? read(options.clean) : 0;
    if (run.outcome.taken || run.overflowed) {
      const ScaleState next = next_scale(options.rule, {run.scale, static_cast<int64_t>(clean)}, run.overflowed);
      if (next.scale != run.scale) write_number(options.scale, next.scale);
      if (options.clean.defined()) write_number(options.clean, static_cast<double>(next.clean));
    }
  }
  return run.outcome;
}

}  // namespace mlpkit
