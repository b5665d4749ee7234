// Epochs and steps of one member (ops).
#include "ops/population_run.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "cpu/update.h"
#include "ops/population_scores.h"

namespace mlpkit {
namespace {

// Sums of squares that were formed in fp32 are taken for what they are within these bounds; beyond, in fp64 again.
constexpr double kSmallestSquares = 1e-24, kLargestSquares = 1e30;

}  // namespace

int64_t MemberRun::epoch() {
  MemberProgress& progress = member_.progress;
  const int64_t rows = member_.rows.numel(), steps = member_.steps_per_epoch();
  const int32_t* table = member_.rows.const_data_ptr<int32_t>();
  work_.order.assign(table, table + rows);
  cpu::shuffle_rows({member_.network.seed, static_cast<uint32_t>(progress.epoch), rows, work_.order.data()});
  double loss = 0.0, weight = 0.0, lr = 0.0;
  int64_t done = 0, taken = 0;
  for (; done < steps && progress.status == "alive"; ++done) {
    lr = member_.recipe.lr *
         schedule_factor(member_.recipe.schedule, progress.step, steps, steps * member_.recipe.epochs);
    const int64_t begin = done * batch_;
    const Verdict verdict = step(work_.order.data() + begin, std::min(batch_, rows - begin), lr);
    ++progress.step;
    if (verdict.cause == MemberCause::none) {
      loss += verdict.loss * verdict.weight;
      weight += verdict.weight;
      progress.skips_in_a_row = 0;
      ++progress.taken;
      ++taken;
      continue;
    }
    ++progress.skipped;
    if (++progress.skips_in_a_row >= kMemberMostSkips) diverge(verdict.cause, progress.step - kMemberMostSkips);
    if (done + 1 == steps && taken == 0) diverge(verdict.cause, progress.step - steps);
  }
  progress.train_loss.push_back(loss / weight);
  progress.lr.push_back(lr);
  score();
  ++progress.epoch;
  if (progress.status == "alive" && progress.epoch >= member_.recipe.epochs) progress.status = "epochs";
  return done;
}

void MemberRun::diverge(MemberCause cause, int64_t step) {
  MemberProgress& progress = member_.progress;
  if (progress.status != "alive") return;
  progress.status = "diverged";
  progress.cause = text_of(cause);
  progress.stopped_step = step;
}

// The loss of the batch as the kernels take it, its targets gathered.
StepLoss MemberRun::gather(const int32_t* rows, int64_t count) {
  StepLoss loss{};
  loss.kind = task_.loss;
  loss.delta = static_cast<float>(task_.delta);
  const int64_t outputs = layers_.back().out, lanes = panels_of(count) * kPanel;
  const bool weighted = data_.weights.defined();
  const float* of_rows = weighted ? data_.weights.const_data_ptr<float>() : nullptr;
  float* free = work_.batch.at_least(panels_of(batch_) * kPanel * (3 + outputs));
  const auto take = [&](int64_t floats) {
    float* taken = free;
    free += floats;
    return taken;
  };
  counted_ = static_cast<double>(count);
  if (weighted) {
    float* by_row = take(lanes);
    counted_ = 0.0;
    for (int64_t i = 0; i < lanes; ++i) counted_ += by_row[i] = i < count ? of_rows[rows[i]] : 0.f;
    loss.by_row = by_row;
  }
  if (of_classes(task_.loss)) {
    const int32_t* all = data_.classes.const_data_ptr<int32_t>();
    int32_t* classes = reinterpret_cast<int32_t*>(take(lanes));
    float* weights = take(lanes);
    for (int64_t i = 0; i < lanes; ++i) {
      classes[i] = i < count ? all[rows[i]] : kNoRow;
      weights[i] = i < count ? 1.f : 0.f;
    }
    loss.classes = classes;
    loss.weights = weights;
    const double smoothing = member_.recipe.label_smoothing, of_outputs = static_cast<double>(outputs);
    loss.smoothing = {static_cast<float>(1.0 - smoothing), static_cast<float>(smoothing / of_outputs),
                      static_cast<float>(of_outputs)};
    loss_scale_ = 1.0 / counted_;
  } else {
    const float* all = data_.target.const_data_ptr<float>();
    float* target = take(count * outputs);
    for (int64_t i = 0; i < count; ++i) std::copy_n(all + rows[i] * outputs, outputs, target + i * outputs);
    loss.target = target;
    loss_scale_ = 1.0 / (counted_ * static_cast<double>(outputs));
  }
  loss.scale = static_cast<float>(loss_scale_);
  return loss;
}

MemberRun::Verdict MemberRun::step(const int32_t* rows, int64_t count, double lr) {
  const StepLoss loss = gather(rows, count);
  if (counted_ == 0.0) return {MemberCause::none, 0.0, 0.0};
  set_weights();
  for (StepLayer& layer : layers_) layer.dropout.offset = static_cast<uint32_t>(member_.progress.step);
  const double value = forward_and_backward(rows, count, loss);
  // Beyond float32, a loss in float32 is Inf.
  if (!(std::abs(value) <= FLT_MAX))
    return {std::isnan(value) ? MemberCause::loss_nan : MemberCause::loss_inf, value, counted_};
  const double norm = gradient_norm(rows, count), clip = member_.recipe.clip_norm;
  if (!std::isfinite(norm)) return {MemberCause::gradient, value, counted_};
  const double applied = clip > 0.0 ? std::min(norm, clip) : norm;
  if (!averages_finite()) return {MemberCause::average, value, counted_};
  if (!update(norm > applied ? applied / norm : 1.0, applied, lr)) return {MemberCause::update, value, counted_};
  move_averages();
  return {MemberCause::none, value, counted_};
}

double MemberRun::gradient_norm(const int32_t* rows, int64_t count) {
  double sum = 0.0;
  for (StepGradient& piece : pieces_) {
    piece.rows = count;
    piece.x = data_.x.const_data_ptr<float>();
    piece.index = rows;
    kernels_.gradient(piece);
    sum += *piece.squares;
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (slope_gradients_[i]) sum += slope_gradients(layers_[i], count, 1, slope_gradients_[i]);
    sum += norm_gradients(layers_[i], count, work_.norms[i]);
  }
  if (sum > kSmallestSquares && sum < kLargestSquares) return std::sqrt(sum);
  const float* gradient = work_.gradients.at_least(0);
  sum = 0.0;
  for (int64_t i = 0; i < member_.parameters; ++i) sum += static_cast<double>(gradient[i]) * gradient[i];
  return std::sqrt(sum);
}

// Whether the update was made; what is not finite afterwards is put back.
bool MemberRun::update(double scale, double largest_gradient, double lr) {
  const bool proven =
      largest_gradient <= kMemberLargest && largest_ <= kMemberLargest && !negative_ && member_.recipe.modest(lr);
  const int64_t floats = member_.running() - member_.values();
  float* saved = proven ? nullptr : work_.saved.at_least(floats);
  if (saved) std::copy_n(member_.values(), floats, saved);
  float largest = 0.f;
  cpu::update({member_.settings(lr), static_cast<float>(scale), member_.parameters, member_.values(),
               work_.gradients.at_least(0), member_.first(), member_.second(), &largest});
  if (saved && !(largest <= FLT_MAX)) {
    std::copy_n(saved, floats, member_.values());
    return false;
  }
  largest_ = largest;
  return true;
}

void MemberRun::score() {
  MemberProgress& progress = member_.progress;
  constexpr double nothing = std::numeric_limits<double>::quiet_NaN();
  if (!member_.validates() || progress.status == "diverged") {
    progress.validation_loss.push_back(nothing);
    progress.metric.push_back(nothing);
    return;
  }
  MemberScorer scorer(task_, member_, false, work_);
  const MemberScores scores = scorer.scores(validation_, member_.validation_rows);
  progress.validation_loss.push_back(scores.loss);
  progress.metric.push_back(scores.metric);
  if (!std::isfinite(scores.loss) || !std::isfinite(scores.metric))
    return diverge(MemberCause::validation, progress.step - 1);
  judge();
}

// Best epoch and patience by the metric.
void MemberRun::judge() {
  MemberProgress& progress = member_.progress;
  const double sign = task_.higher_is_better() ? 1.0 : -1.0, metric = progress.metric.back();
  const bool begins = progress.best_epoch < 0;
  if (begins || sign * metric > sign * progress.best) {
    progress.best = metric;
    progress.best_epoch = progress.epoch;
    member_.keep_best();
  }
  if (begins || sign * (metric - progress.mark) > member_.recipe.min_delta) {
    progress.mark = metric;
    progress.waited = 0;
  } else if (++progress.waited >= member_.recipe.patience && member_.recipe.patience > 0) {
    progress.status = "patience";
  }
}

}  // namespace mlpkit
