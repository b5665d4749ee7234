// guarded_update: schema and CPU kernel; a GuardedUpdate that lives for one call (ops).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/guarded_update_lists.h"

namespace mlpkit {
namespace {

std::tuple<at::Tensor, at::Tensor> guarded_update_cpu(
    at::TensorList params, at::TensorList grads, at::TensorList first, at::TensorList second, at::TensorList third,
    at::TensorList copies, at::TensorList steps, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& clean_steps, const std::optional<at::Tensor>& found_inf,
    const std::optional<at::Tensor>& bounds, c10::string_view kind, at::IntArrayRef groups,
    at::ArrayRef<double> settings, double clip_norm, double growth, double backoff, int64_t growth_interval,
    double floor, double ceiling, bool force) {
  const Optimizer optimizer = guarded_kind_from_name(kind);
  const std::vector<GuardedGroup> all = guarded_groups_of(settings);
  const GuardedOptions options = guarded_options_of(scale, clean_steps, found_inf, clip_norm,
                                                    {growth, backoff, floor, ceiling, growth_interval}, force);
  GuardedUpdate update(optimizer, guarded_rows_of({params, grads, first, second, third, copies, steps, groups}));
  check_guarded_state(optimizer, update.rows(), all);
  const int64_t rows = static_cast<int64_t>(params.size());
  if (bounds) {
    check_bounds(*bounds, rows);
    std::copy_n(bounds->const_data_ptr<double>(), 4 * rows, reinterpret_cast<double*>(update.extents().data()));
    update.trust_extents();
  }
  const GuardedOutcome outcome = update.run(grads.vec(), all, options);
  if (bounds)
    std::copy_n(reinterpret_cast<double*>(update.extents().data()), 4 * rows, bounds->mutable_data_ptr<double>());

  const auto float64 = at::TensorOptions().dtype(at::kDouble);
  at::Tensor result = at::empty({kGuardedOutcome}, float64), census = at::empty({rows, kGuardedCensus}, float64);
  const double numbers[] = {
      static_cast<double>(outcome.taken), static_cast<double>(outcome.reason), outcome.norm, outcome.factor,
      static_cast<double>(outcome.row),   static_cast<double>(outcome.rows)};
  std::copy_n(numbers, kGuardedOutcome, result.mutable_data_ptr<double>());
  double* to = census.mutable_data_ptr<double>();
  for (const RangeCensus& row : update.census()) {
    const double columns[] = {static_cast<double>(row.nan), static_cast<double>(row.inf),
                              static_cast<double>(row.first), row.absmax, row.sum_of_squares};
    to = std::copy_n(columns, kGuardedCensus, to);
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
