// The lists that the op guarded_update takes, as rows and groups, checked; for every device's kernel (ops).
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "ops/guarded_update.h"

namespace mlpkit {

constexpr size_t kGuardedSettings = 13;  // numbers of a group
constexpr int64_t kGuardedOutcome = 6, kGuardedCensus = 5;

inline Optimizer guarded_kind_from_name(c10::string_view name) {
  constexpr const char* names[] = {"sgd", "adam", "adamw", "rmsprop", "lars", "lamb"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<Optimizer>(i);
  TORCH_CHECK_VALUE(false, "guarded_update: kind is '", name, "'; it must be sgd, adam, adamw, rmsprop, lars or lamb");
}

inline GuardedGroup guarded_group_of(const double* x) {
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9] != 0, x[10] != 0, x[11] != 0, x[12] != 0};
}

struct GuardedLists {
  at::TensorList p, g, first, second, third, copies, steps;
  at::IntArrayRef groups;
};

inline std::vector<GuardedRow> guarded_rows_of(const GuardedLists& lists) {
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

inline void check_guarded_state(Optimizer kind, const std::vector<GuardedRow>& rows,
                                const std::vector<GuardedGroup>& groups) {
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

// settings: the numbers of each group, in mlpkit.ops.guarded_update.GroupSettings' order.
inline std::vector<GuardedGroup> guarded_groups_of(at::ArrayRef<double> settings) {
  TORCH_CHECK_VALUE(settings.size() % kGuardedSettings == 0, "guarded_update: settings has ", settings.size(),
                    " numbers; it must have ", kGuardedSettings, " for each group");
  std::vector<GuardedGroup> groups;
  for (size_t i = 0; i < settings.size(); i += kGuardedSettings)
    groups.push_back(guarded_group_of(settings.data() + i));
  return groups;
}
inline GuardedOptions guarded_options_of(const std::optional<at::Tensor>& scale,
                                         const std::optional<at::Tensor>& clean_steps,
                                         const std::optional<at::Tensor>& found_inf, double clip_norm,
                                         const GuardedScale& rule, bool force) {
  TORCH_CHECK_VALUE(clip_norm > 0, "guarded_update: clip_norm is ", clip_norm,
                    "; it must be above 0 (inf: no clipping)");
  GuardedOptions options;
  options.clip = clip_norm;
  options.scale = scale.value_or(at::Tensor());
  options.clean = clean_steps.value_or(at::Tensor());
  options.found = found_inf.value_or(at::Tensor());
  options.rule = rule;
  options.force = force;
  return options;
}
inline void check_bounds(const at::Tensor& bounds, int64_t rows) {
  TORCH_CHECK_VALUE(bounds.scalar_type() == at::kDouble && bounds.is_contiguous() && bounds.dim() == 2 &&
                        bounds.size(0) == rows && bounds.size(1) == 4,
                    "guarded_update: bounds is ", bounds.scalar_type(), " of shape ", bounds.sizes(),
                    "; it must be contiguous float64 (", rows, ", 4)");
}

}  // namespace mlpkit
