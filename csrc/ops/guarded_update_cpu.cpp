// guarded_update: schema and CPU kernel; a GuardedUpdate that lives for one call (ops).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "ops/guarded_update.h"

namespace mlpkit {
namespace {

constexpr size_t kSettings = 13;  // numbers of a group
constexpr int64_t kOutcome = 6, kCensus = 5;

Optimizer kind_from_name(c10::string_view name) {
  constexpr const char* names[] = {"sgd", "adam", "adamw", "rmsprop", "lars", "lamb"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<Optimizer>(i);
  TORCH_CHECK_VALUE(false, "guarded_update: kind is '", name, "'; it must be sgd, adam, adamw, rmsprop, lars or lamb");
}

GuardedGroup group_of(const double* x) {
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9] != 0, x[10] != 0, x[11] != 0, x[12] != 0};
}

struct Lists {
  at::TensorList p, g, first, second, third, copies, steps;
  at::IntArrayRef groups;
};

std::vector<GuardedRow> rows_of(const Lists& lists) {
  std::vector<GuardedRow> rows(lists.p.size());
  const auto fill = [&](const char* name, at::TensorList from, at::Tensor GuardedRow::* to) {
    TORCH_CHECK_VALUE(from.empty() || from.size() == rows.size(), "guarded_update: ", name, " has ", from.size(),
                      " tensors, params has ", rows.size());
    for (size_t i = 0; i < from.size(); ++i) rows[i].*to = from[i];
  };
  fill("params", lists.p, &GuardedRow::p);
  fill("first", lists.first, &GuardedRow::first);
  fill("second", lists.second, &GuardedRow::second);
  fill("third", lists.third, &GuardedRow::third);
  fill("copies", lists.copies, &GuardedRow::copy);
  fill("steps", lists.steps, &GuardedRow::step);
  TORCH_CHECK_VALUE(lists.g.size() == rows.size() && lists.groups.size() == rows.size(), "guarded_update: there are ",
                    rows.size(), " params, ", lists.g.size(), " grads and ", lists.groups.size(), " group indices");
  for (size_t i = 0; i < rows.size(); ++i) rows[i].group = lists.groups[i];
  return rows;
}

void check_state(Optimizer kind, const std::vector<GuardedRow>& rows, const std::vector<GuardedGroup>& groups) {
  for (const GuardedRow& row : rows) {
    TORCH_CHECK_VALUE(row.group >= 0 && row.group < static_cast<int64_t>(groups.size()), "guarded_update: group index ",
                      row.group, " of ", groups.size(), " groups");
    const GuardedGroup& g = groups[row.group];
    const bool adam = kind == Optimizer::adam || kind == Optimizer::adamw || kind == Optimizer::lamb;
    const bool first = adam || g.momentum != 0, second = adam || kind == Optimizer::rmsprop;
    const bool third = g.amsgrad || g.centered;
    TORCH_CHECK_VALUE(row.first.defined() >= first && row.second.defined() >= second && row.third.defined() >= third,
                      "guarded_update: these settings need state that was not given: first ", first, ", second ",
                      second, ", third ", third);
    TORCH_CHECK_VALUE(row.step.defined(), "guarded_update: steps must hold one count for each parameter");
  }
}

std::tuple<at::Tensor, at::Tensor> guarded_update_cpu(
    at::TensorList params, at::TensorList grads, at::TensorList first, at::TensorList second, at::TensorList third,
    at::TensorList copies, at::TensorList steps, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& clean_steps, const std::optional<at::Tensor>& found_inf,
    const std::optional<at::Tensor>& bounds, c10::string_view kind, at::IntArrayRef groups,
    at::ArrayRef<double> settings, double clip_norm, double growth, double backoff, int64_t growth_interval,
    double floor, double ceiling, bool force) {
  const Optimizer optimizer = kind_from_name(kind);
  TORCH_CHECK_VALUE(settings.size() % kSettings == 0, "guarded_update: settings has ", settings.size(),
                    " numbers; it must have ", kSettings, " for each group");
  TORCH_CHECK_VALUE(clip_norm > 0, "guarded_update: clip_norm is ", clip_norm,
                    "; it must be above 0 (inf: no clipping)");
  std::vector<GuardedGroup> all;
  for (size_t i = 0; i < settings.size(); i += kSettings) all.push_back(group_of(settings.data() + i));
  GuardedOptions options;
  options.clip = clip_norm;
  options.scale = scale.value_or(at::Tensor());
  options.clean = clean_steps.value_or(at::Tensor());
  options.found = found_inf.value_or(at::Tensor());
  options.rule = {growth, backoff, floor, ceiling, growth_interval};
  options.force = force;
  GuardedUpdate update(optimizer, rows_of({params, grads, first, second, third, copies, steps, groups}));
  check_state(optimizer, update.rows(), all);
  const int64_t rows = static_cast<int64_t>(params.size());
  if (bounds) {
    TORCH_CHECK_VALUE(bounds->scalar_type() == at::kDouble && bounds->is_contiguous() && bounds->dim() == 2 &&
                          bounds->size(0) == rows && bounds->size(1) == 4,
                      "guarded_update: bounds is ", bounds->scalar_type(), " of shape ", bounds->sizes(),
                      "; it must be contiguous float64 (", rows, ", 4)");
    std::copy_n(bounds->const_data_ptr<double>(), 4 * rows, reinterpret_cast<double*>(update.extents().data()));
    update.trust_extents();
  }
  const GuardedOutcome outcome = update.run(grads.vec(), all, options);
  if (bounds)
    std::copy_n(reinterpret_cast<double*>(update.extents().data()), 4 * rows, bounds->mutable_data_ptr<double>());

  const auto float64 = at::TensorOptions().dtype(at::kDouble);
  at::Tensor result = at::empty({kOutcome}, float64), census = at::empty({rows, kCensus}, float64);
  const double numbers[] = {
      static_cast<double>(outcome.taken), static_cast<double>(outcome.reason), outcome.norm, outcome.factor,
      static_cast<double>(outcome.row),   static_cast<double>(outcome.rows)};
  std::copy_n(numbers, kOutcome, result.mutable_data_ptr<double>());
  double* to = census.mutable_data_ptr<double>();
  for (const RangeCensus& row : update.census()) {
    const double columns[] = {static_cast<double>(row.nan), static_cast<double>(row.inf),
                              static_cast<double>(row.first), row.absmax, row.sum_of_squares};
    to = std::copy_n(columns, kCensus, to);
  }
  return {result, census};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlpkit, m) {
  // The contract is that of mlpkit.ops.guarded_update.guarded_update, in its order: outcome, census.
  m.def(
      "guarded_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, "
      "Tensor(d!)[] third, Tensor(e!)[] copies, Tensor(f!)[] steps, Tensor(g!)? scale, Tensor(h!)? clean_steps, "
      "Tensor(i!)? found_inf, Tensor(j!)? bounds, str kind, int[] groups, float[] settings, float clip_norm, "
      "float growth, float backoff, int growth_interval, float floor, float ceiling, bool force) -> "
      "(Tensor outcome, Tensor census)");
}

TORCH_LIBRARY_IMPL(mlpkit, CPU, m) { m.impl("guarded_update", guarded_update_cpu); }

}  // namespace mlpkit
