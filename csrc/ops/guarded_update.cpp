// GuardedUpdate on the CPU: census, decision, proof, update; chunks of fixed size, so that threads change no bit (ops).
#include "ops/guarded_update.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "ops/dtype.h"

namespace mlpkit {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements of one tensor that are summed in one go
constexpr int64_t kUnit = 1 << 16;   // elements that are worth another thread
constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
constexpr double kLargestDouble = std::numeric_limits<double>::max();

double largest_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return kLargestDouble;
    case Dtype::float32:
      return 0x1.fffffep127;
    case Dtype::bfloat16:
      return 0x1.fep127;
    case Dtype::float16:
      return 65504.0;
  }
  return 0;
}

double read(const at::Tensor& number) {
  return number.scalar_type() == at::kDouble  ? *number.const_data_ptr<double>()
         : number.scalar_type() == at::kFloat ? *number.const_data_ptr<float>()
                                              : *number.const_data_ptr<int32_t>();
}
void write_number(const at::Tensor& number, double value) {
  if (number.scalar_type() == at::kDouble)
    *number.mutable_data_ptr<double>() = value;
  else if (number.scalar_type() == at::kFloat)
    *number.mutable_data_ptr<float>() = static_cast<float>(value);
  else
    *number.mutable_data_ptr<int32_t>() = static_cast<int32_t>(value);
  number.unsafeGetTensorImpl()->bump_version();
}

void check_number(const char* name, const at::Tensor& number, at::ScalarType dtype) {
  if (number.defined())
    TORCH_CHECK_VALUE(number.is_cpu() && number.numel() == 1 && number.scalar_type() == dtype, "guarded_update: ", name,
                      " is ", number.scalar_type(), " of shape ", number.sizes(), " on ", number.device(),
                      "; it must be one ", dtype == at::kInt ? "int32" : "float32", " number on cpu");
}

bool finite(const GuardedGroup& g) {
  for (const double x : {g.lr, g.beta1, g.beta2, g.eps, g.momentum, g.dampening, g.weight_decay, g.l1, g.trust})
    if (!std::isfinite(x)) return false;
  return true;
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

void merge(RangeCensus& total, const RangeCensus& part, int64_t offset) {
  if (total.first < 0 && part.first >= 0) total.first = offset + part.first;
  total.nan += part.nan;
  total.inf += part.inf;
  total.absmax = std::max(total.absmax, part.absmax);
  total.sum_of_squares += part.sum_of_squares;
  total.negative = total.negative || part.negative;
}

// NaN stays.
void raise_to(double& bound, double value) {
  if (!(value <= bound) && !std::isnan(bound)) bound = value;
}

}  // namespace

bool same_layout(const at::Tensor& tensor, at::IntArrayRef strides) {
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) != strides[i]) return false;
  return true;
}

struct GuardedUpdate::Run {
  const std::vector<GuardedGroup>& groups;
  const GuardedOptions& options;
  std::vector<at::Tensor> gradients;                  // by row, dense
  std::vector<uint8_t> active, looked, doubtful;      // by row; looked: its extents are read in this run
  std::vector<OptimizerSettingsOf<double>> settings;  // by row
  std::vector<double> steps, squares_of_p;            // by row; steps: the count if this one is taken
  std::vector<RangeCensus> parts;                     // by chunk
  std::vector<std::array<RangeCensus, 4>> states;     // by chunk
  std::vector<std::array<double, 4>> largest;         // by chunk
  std::vector<double> squares;                        // by chunk: of lamb's direction
  GuardedOutcome outcome{false, GuardedReason::taken, 0, 0, -1, 0};
  double scale = 1, shrink = 1;
  bool overflowed = false;
};

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

GuardedUpdate::Seen GuardedUpdate::seen(const GuardedRow& row) const {
  Seen result;
  const at::Tensor* tensors[] = {&row.p, &row.first, &row.second, &row.third};
  for (int i = 0; i < 4; ++i) {
    if (!tensors[i]->defined()) continue;
    result.data[i] = tensors[i]->const_data_ptr();
    if (!tensors[i]->is_inference())
      result.version[i] = tensors[i]->unsafeGetTensorImpl()->version_counter().current_version();
  }
  return result;
}

// Pass 1: the gradients, and whatever nothing is known of.
void GuardedUpdate::take_census(Run& run, double shrink) {
  const bool again = !run.parts.empty(), norms = kind_ == Optimizer::lars || kind_ == Optimizer::lamb;
  run.parts.resize(chunks_.size());
  run.states.resize(chunks_.size());
  run.shrink = shrink;
  each_chunk([&](size_t i, const Chunk& chunk) {
    if (!run.active[chunk.row]) return;
    const GuardedRow& row = rows_[chunk.row];
    const auto look = [&](const at::Tensor& tensor, RangeCensus& result) {
      const char* data = static_cast<const char*>(tensor.const_data_ptr());
      cpu::census_of_range({dtype_of("guarded_update", "a tensor", tensor), data + chunk.begin * tensor.element_size(),
                            chunk.count, shrink, &result});
    };
    look(run.gradients[chunk.row], run.parts[i]);
    if (again) return;
    const at::Tensor* tensors[] = {&row.p, &row.first, &row.second, &row.third};
    for (int k = 0; k < 4; ++k)
      if (tensors[k]->defined() && (run.looked[chunk.row] || (norms && k == 0))) look(*tensors[k], run.states[i][k]);
  });
  census_.assign(rows_.size(), {0, 0, -1, 0, 0, false});
  for (size_t i = 0; i < chunks_.size(); ++i)
    if (run.active[chunks_[i].row]) merge(census_[chunks_[i].row], run.parts[i], chunks_[i].begin);
  if (again) return;
  for (size_t row = 0; row < rows_.size(); ++row)
    if (run.looked[row]) extents_[row] = {0, 0, 0, 0};
  run.squares_of_p.assign(norms ? rows_.size() : 0, 0);
  for (size_t i = 0; i < chunks_.size(); ++i) {
    const Chunk& chunk = chunks_[i];
    if (!run.active[chunk.row]) continue;
    if (norms) run.squares_of_p[chunk.row] += run.states[i][0].sum_of_squares;
    if (!run.looked[chunk.row]) continue;
    Extents& e = extents_[chunk.row];
    double* bounds[] = {&e.p, &e.first, &e.second, &e.third};
    const at::Tensor* tensors[] = {&rows_[chunk.row].p, &rows_[chunk.row].first, &rows_[chunk.row].second,
                                   &rows_[chunk.row].third};
    for (int k = 0; k < 4; ++k) {
      if (!tensors[k]->defined()) continue;
      const RangeCensus& state = run.states[i][k];
      const bool wrong = state.nan || state.inf || (k == 2 && state.negative);
      raise_to(*bounds[k], wrong ? kUnknown : state.absmax);
    }
  }
}

// Whether gradients, norm, scale and settings allow a step; what it multiplies the gradients by.
bool GuardedUpdate::decide(Run& run) {
  GuardedOutcome& outcome = run.outcome;
  const auto refuse = [&](GuardedReason reason, int64_t row) {
    outcome.reason = reason;
    outcome.row = row;
    return false;
  };
  double total = 0, absmax = 0;
  int64_t first = -1;
  for (size_t row = 0; row < rows_.size(); ++row) {
    if (!run.active[row]) continue;
    total += census_[row].sum_of_squares;
    absmax = std::max(absmax, census_[row].absmax);
    if (census_[row].first < 0) continue;
    if (first < 0) first = static_cast<int64_t>(row);
    ++outcome.rows;
  }
  outcome.factor = 1 / run.scale;
  const at::Tensor& found = run.options.found;
  run.overflowed = outcome.rows > 0 || (found.defined() && read(found) != 0);
  outcome.norm = std::sqrt(total) / run.scale;
  if (run.overflowed) {
    const auto has_nan = [](const RangeCensus& part) { return part.nan > 0; };
    const bool nan = std::any_of(census_.begin(), census_.end(), has_nan);
    if (outcome.rows) outcome.norm = nan ? kUnknown : std::numeric_limits<double>::infinity();
    return refuse(GuardedReason::gradient, first);
  }
  if (absmax > 0 && !(total >= 0x1p-1000 && total <= kLargestDouble)) {
    // Squares that double cannot hold: those of gradients divided by the largest of them can.
    take_census(run, std::min(1 / absmax, 0x1p1000));
    total = 0;
    for (size_t row = 0; row < rows_.size(); ++row)
      if (run.active[row]) total += census_[row].sum_of_squares;
    outcome.norm = 1 / run.shrink / run.scale * std::sqrt(total);
  }
  if (!(run.scale > 0)) return refuse(GuardedReason::scale, -1);
  outcome.factor = guarded_factor(run.scale, outcome.norm, run.options.clip);
  if (!(1 / run.scale <= 0x1p127) || !(outcome.factor > 0)) return refuse(GuardedReason::scale, -1);
  if (!(outcome.norm <= kLargestDouble)) return refuse(GuardedReason::norm, -1);
  for (size_t row = 0; row < rows_.size(); ++row)
    if (run.active[row] && !finite(run.groups[rows_[row].group]))
      return refuse(GuardedReason::setting, static_cast<int64_t>(row));
  return true;
}

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

// The settings of every row, and whether its update stays finite: by a bound, or, where that does not hold, by trial.
bool GuardedUpdate::prove(Run& run) {
  double t = -1, power1 = 0, power2 = 0;
  int64_t group = -1;
  bool doubt = false;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!run.active[i]) continue;
    const GuardedRow& row = rows_[i];
    const GuardedGroup& g = run.groups[row.group];
    run.steps[i] = row.step.defined() ? read(row.step) + 1 : row.fresh ? 1 : 2;
    if (run.steps[i] != t || row.group != group) {
      t = run.steps[i];
      group = row.group;
      power1 = std::pow(g.beta1, t);
      power2 = std::pow(g.beta2, t);
    }
    OptimizerSettingsOf<double>& s = run.settings[i];
    s = settings_at(kind_, g, t, power1, power2);
    const double norm_of_p = run.squares_of_p.empty() ? 0 : std::sqrt(run.squares_of_p[i]);
    if (kind_ == Optimizer::lars)
      s.lr = lars_rate(g, norm_of_p, std::sqrt(census_[i].sum_of_squares) / run.shrink * run.outcome.factor);
    if (kind_ == Optimizer::lamb) s.rate = g.lr * norm_of_p;
    const Dtype dtype = dtype_of("guarded_update", "a parameter", row.p);
    const double limit =
        std::min(largest_of(dtype), row.copy.defined() ? largest_of(dtype_of("", "", row.copy)) : kLargestDouble) *
        (1 - 0x1p-7);
    const double wide = (dtype == Dtype::float64 ? kLargestDouble : largest_of(Dtype::float32)) * (1 - 0x1p-7);
    Extents e = extents_[i];
    const bool unbounded = kind_ == Optimizer::lamb && !(s.rate > 0);
    run.doubtful[i] =
        !(t >= 1) || unbounded || !stays_within(s, e, census_[i].absmax * run.outcome.factor, limit, wide);
    doubt = doubt || run.doubtful[i];
  }
  if (!doubt) return true;
  std::vector<uint8_t> bad(chunks_.size(), 0);
  each_chunk([&](size_t i, const Chunk& chunk) {
    if (!run.active[chunk.row] || !run.doubtful[chunk.row]) return;
    RangeUpdate args = range(run, chunk);
    double squares = 0, largest[4];
    args.dry = true;
    args.part = kind_ == Optimizer::lamb ? RangeUpdate::moments : RangeUpdate::whole;
    args.largest = largest;
    args.squares = &squares;
    cpu::range_update(args);
    // As rounding to nearest goes, half a unit above the largest number is still that.
    const auto limit_of = [](Dtype dtype) { return std::min(largest_of(dtype) * (1 + 0x1p-13), kLargestDouble); };
    const double limit = limit_of(args.dtype), limit_of_p = std::min(limit, limit_of(args.copy_dtype));
    // No element of lamb's step is longer than the whole; without a norm it is lr times the direction as it is.
    const OptimizerSettingsOf<double>& s = args.settings;
    if (kind_ == Optimizer::lamb) largest[0] += s.rate > 0 ? s.rate : std::fabs(s.lr) * largest[3];
    bad[i] = !(largest[0] <= limit_of_p && largest[1] <= limit && largest[2] <= limit && largest[3] <= limit);
  });
  const auto first = std::find(bad.begin(), bad.end(), 1);
  if (first == bad.end()) return true;
  if (run.outcome.reason != GuardedReason::taken) return false;
  run.outcome.reason = GuardedReason::update;
  run.outcome.row = chunks_[first - bad.begin()].row;
  return false;
}

// Pass 2.
void GuardedUpdate::write(Run& run) {
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

// What is known of the rows from now on, counts and version counters.
void GuardedUpdate::finish(Run& run) {
  for (size_t row = 0; row < rows_.size(); ++row)
    if (run.active[row]) extents_[row] = {0, 0, 0, 0};
  for (size_t i = 0; i < chunks_.size(); ++i) {
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

GuardedOutcome GuardedUpdate::run(const std::vector<at::Tensor>& gradients, const std::vector<GuardedGroup>& groups,
                                  const GuardedOptions& options) {
  check_number("scale", options.scale, at::kFloat);
  check_number("found_inf", options.found, at::kFloat);
  check_number("clean_steps", options.clean, at::kInt);
  Run run{groups, options, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const size_t count = rows_.size();
  run.gradients.resize(count);
  run.active.assign(count, 0);
  run.looked.assign(count, 0);
  run.doubtful.assign(count, 0);
  run.settings.resize(count);
  run.steps.assign(count, 0);
  for (size_t i = 0; i < count; ++i) {
    if (!gradients[i].defined()) continue;
    run.active[i] = 1;
    run.gradients[i] = dense(gradients[i], rows_[i]);
    run.looked[i] = std::isnan(extents_[i].p) || !(seen_[i] == seen(rows_[i]));
  }
  if (options.scale.defined()) run.scale = read(options.scale);
  take_census(run, 1.0);
  for (size_t i = 0; i < count; ++i)
    if (run.looked[i]) seen_[i] = seen(rows_[i]);
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
