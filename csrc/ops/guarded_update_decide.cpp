// GuardedUpdate before it writes: census, decision, proof (ops).
#include "ops/guarded_update_run.h"

namespace mlpkit {
namespace {

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

void merge(RangeCensus& total, const RangeCensus& part, int64_t offset) {
  if (total.first < 0 && part.first >= 0) total.first = offset + part.first;
  total.nan += part.nan;
  total.inf += part.inf;
  total.absmax = std::max(total.absmax, part.absmax);
  total.sum_of_squares += part.sum_of_squares;
  total.negative = total.negative || part.negative;
}

CensusOfRange range_of(const at::Tensor& tensor, int64_t begin, int64_t count, double shrink, RangeCensus& result) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr()) + begin * tensor.element_size();
  return {dtype_of("guarded_update", "a tensor", tensor), data, count, shrink, &result};
}

}  // namespace

// Pass 1: the gradients, multiplied by a factor on the way unless it is 1.
void GuardedUpdate::take_census(Run& run, double shrink, double factor) {
  run.parts.resize(chunks_.size());
  run.shrink = shrink;
  each_chunk([&](size_t i, const Chunk& chunk) {
    if (!run.active[chunk.row]) return;
    CensusOfRange args = range_of(run.gradients[chunk.row], chunk.begin, chunk.count, shrink, run.parts[i]);
    if (factor != 1) {
      args.to = const_cast<void*>(args.data);
      args.factor = factor;
    }
    cpu::census_of_range(args);
  });
  census_.assign(rows_.size(), {0, 0, -1, 0, 0, false});
  for (size_t i = 0; i < chunks_.size(); ++i)
    if (run.active[chunks_[i].row]) merge(census_[chunks_[i].row], run.parts[i], chunks_[i].begin);
  for (size_t row = 0; row < rows_.size(); ++row)
    if (!run.active[row]) census_[row].absmax = kUnknown;
}

// As torch's scaler does it: by a float32 factor, in place. False: not to be done here, and nothing has been.
bool GuardedUpdate::unscale(Run& run, const std::vector<at::Tensor>& given) {
  const float factor = static_cast<float>(1 / run.scale);
  if (!(run.scale > 0) || !(factor > 0) || !std::isfinite(factor)) return false;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!run.active[i]) continue;
    const bool in_place = given[i].is_same(run.gradients[i]) && given[i].scalar_type() != at::kHalf;
    if (!in_place || !is_finite(run.groups[rows_[i].group])) return false;
  }
  for (size_t i = 0; i < rows_.size(); ++i)
    if (run.active[i]) given[i].unsafeGetTensorImpl()->mutable_data();  // a lazy copy ends
  take_census(run, 1.0, factor);
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (!run.active[i]) continue;
    census_[i].absmax *= factor;
    census_[i].sum_of_squares *= static_cast<double>(factor) * factor;
    if (!given[i].is_inference()) given[i].unsafeGetTensorImpl()->bump_version();
  }
  unscaled_by_ = factor;
  run.scale = 1;
  run.outcome.unscaled = true;
  return true;
}

// Whatever nothing is known of, and the norms that lars and lamb go by.
void GuardedUpdate::look(Run& run, const std::vector<uint8_t>& rows) {
  const bool norms = kind_ == Optimizer::lars || kind_ == Optimizer::lamb;
  if (!norms && std::find(rows.begin(), rows.end(), 1) == rows.end()) return;
  run.states.resize(chunks_.size());
  each_chunk([&](size_t i, const Chunk& chunk) {
    if (!run.active[chunk.row]) return;
    const auto tensors = rows_[chunk.row].state();
    for (int k = 0; k < 4; ++k)
      if (tensors[k]->defined() && (rows[chunk.row] || (norms && k == 0)))
        cpu::census_of_range(range_of(*tensors[k], chunk.begin, chunk.count, 1.0, run.states[i][k]));
  });
  for (size_t row = 0; row < rows_.size(); ++row)
    if (rows[row]) extents_[row] = {0, 0, 0, 0};
  run.squares_of_p.assign(norms ? rows_.size() : 0, 0);
  for (size_t i = 0; i < chunks_.size(); ++i) {
    const Chunk& chunk = chunks_[i];
    if (!run.active[chunk.row]) continue;
    if (norms) run.squares_of_p[chunk.row] += run.states[i][0].sum_of_squares;
    if (!rows[chunk.row]) continue;
    Extents& e = extents_[chunk.row];
    double* bounds[] = {&e.p, &e.first, &e.second, &e.third};
    const auto tensors = rows_[chunk.row].state();
    for (int k = 0; k < 4; ++k) {
      if (!tensors[k]->defined()) continue;
      const RangeCensus& state = run.states[i][k];
      const bool wrong = state.nan || state.inf || (k == 2 && state.negative);
      raise_to(*bounds[k], wrong ? kUnknown : state.absmax);
    }
  }
  for (size_t i = 0; i < rows_.size(); ++i)
    if (rows[i]) seen_[i] = seen(rows_[i]);
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
    take_census(run, std::min(1 / absmax, 0x1p1000), 1);
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
    if (run.active[row] && !is_finite(run.groups[rows_[row].group]))
      return refuse(GuardedReason::setting, static_cast<int64_t>(row));
  return true;
}

// The settings of every row, and whether a bound shows that its update stays finite.
bool GuardedUpdate::bounded(Run& run) {
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
    const double gradient = census_[i].absmax * run.outcome.factor;
    run.doubtful[i] = !(t >= 1) || unbounded || !stays_within(s, e, gradient, limit, wide) ||
                      (run.options.torch && !stays_within_torch(s, e, gradient, wide));
    run.bounds[i] = e;
    doubt = doubt || run.doubtful[i];
  }
  return !doubt;
}

// By a bound, or, where that does not hold, by trial; no trial is made of torch's own operations.
bool GuardedUpdate::prove(Run& run) {
  if (bounded(run)) return true;
  if (run.options.torch) {
    // Bounds grow wider than the truth with every step, and whether this one is taken must depend on the truth alone.
    std::vector<uint8_t> stale(rows_.size(), 0);
    for (size_t i = 0; i < rows_.size(); ++i) stale[i] = run.doubtful[i] && !run.looked[i];
    look(run, stale);
    if (bounded(run)) return true;
    run.outcome.reason = GuardedReason::update;
    run.outcome.row = std::find(run.doubtful.begin(), run.doubtful.end(), 1) - run.doubtful.begin();
    return false;
  }
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

}  // namespace mlpkit
