// The kernels of population.h: members trained through whole epochs, and their outputs (cuda). What bounds them is in
// population_plan.h.
#include "cuda/population.h"

#include <float.h>

#include "cuda/guarded_range.h"
#include "cuda/population_epoch.h"
#include "cuda/population_update.h"

namespace mlpkit::cuda {
namespace {

template <class T>
class MemberTraining : public MemberPass<T> {
  using Pass = MemberPass<T>;
  using Pass::head, Pass::job, Pass::plan, Pass::thread, Pass::threads, Pass::warps;

 public:
  MLPKIT_DEVICE MemberTraining(const MemberLaunch& launch) : Pass(launch.warps), launch_(launch) {}

  MLPKIT_DEVICE void run() {
    for (;;) {
      if (thread() == 0) device::store(&head().next, device::atomic_add(launch_.next, 1));
      device::sync();
      uint32_t next;
      device::load(&head().next, next);
      if (next >= static_cast<uint32_t>(launch_.count)) return;
      this->take(launch_.jobs + next);
      train();
      device::sync();
    }
  }

 private:
  MLPKIT_DEVICE int32_t* order() const { return launch_.order + 2 * launch_.most_rows * device::block_index(); }
  MLPKIT_DEVICE float* gradients() const {
    return plan().gradients >= 0 ? this->floats(plan().gradients)
                                 : launch_.gradients + launch_.most_floats * device::block_index();
  }
  MLPKIT_DEVICE static bool alive() { return head().now.status == MemberStatus::alive; }

  MLPKIT_DEVICE void train() {
    prepare();
    while (head().now.epochs_of_launch < job().epochs && alive()) {
      shuffle_rows(job().row, job().rows, job().seed, static_cast<uint32_t>(head().now.epoch), order(),
                   reinterpret_cast<uint32_t*>(order() + launch_.most_rows), head().flags, threads());
      // Steps, and then the scores: one loop, so that the code of a pass is there once.
      for (bool steps = true; steps;) {
        steps = head().batch < job().steps && alive();
        if (steps)
          train_batch();
        else if (job().validation_rows > 0 && alive())
          passes(false, 0, job().validation_rows);
      }
      end_epoch();
    }
    if (thread() == 0) write(job().now, head().now);
  }

  MLPKIT_DEVICE void prepare() {
    if (thread() == 0) {
      MemberHead& all = head();
      all.now = read(job().now);
      all.begun_step = all.now.step;
      all.begun_taken = all.now.taken;
      all.loss = all.weight = 0.0;
      all.taken = all.batch = 0;
    }
    // Between a slope and the next tensor nothing writes gradients.
    for (int i = 0; i < job().layers; ++i)
      if (job().layer[i].slope >= 0 && thread() < 16) device::store(gradients() + job().layer[i].slope + thread(), 0.f);
    this->load_weights(job().values);
    largest_seen(head().largest, inspect_member(job(), thread(), threads()));
    device::sync();
  }

  MLPKIT_DEVICE void train_batch() {
    const int begin = head().batch * job().batch, left = job().rows - begin,
              count = left < job().batch ? left : job().batch;
    const double counted = weight_of(begin, count);
    MemberCause cause = MemberCause::none;
    if (thread() == 0) {
      head().counted = counted;
      head().settings = settings();
    }
    device::sync();
    if (counted != 0.0) {
      passes(true, begin, count);
      cause = finish_step();
    }
    device::sync();
    if (thread() == 0) count_step(cause);
    device::sync();
  }

  MLPKIT_DEVICE double loss_scale() const {
    const double counted = head().counted;
    return 1.0 / (launch_.table.classes ? counted : counted * static_cast<double>(this->outputs()));
  }

  // A batch forward and backward, or all validation rows forward.
  MLPKIT_DEVICE void passes(bool training, int begin, int count) {
    const bool right = !training && launch_.task.metric == PopulationMetric::accuracy;
    for (int first = 0; first < count; first += plan().rows) {
      const MemberTable& table = training ? launch_.table : launch_.validation;
      const int left = count - first;
      this->first_tile_ = first / 16;
      this->gather(table, training ? order() : job().validation_row, begin + first,
                   left < plan().rows ? left : plan().rows);
      this->forward(training);
      const Smoothing smoothing{training ? job().certain : 1.f, training ? job().spread : 0.f,
                                static_cast<float>(this->outputs())};
      const float scale = training ? static_cast<float>(loss_scale()) : 1.f;
      const MemberLoss loss{launch_.task, smoothing, scale, table, this->outputs()};
      this->score(loss, training, right, first == 0);
      if (training)
        this->backward(gradients(), first == 0, left <= plan().rows);
      else if (by_column())
        score_columns(loss, first == 0);
    }
  }

  // The loss before any scale.
  MLPKIT_DEVICE double loss_of_scores() const { return this->sum_of_warps(head().scores, 3); }

  MLPKIT_DEVICE MemberCause finish_step() {
    const double squares = this->sum_of_warps(head().squares, 1);
    const double value = loss_of_scores() * loss_scale(), norm = ::sqrt(squares);
    // Beyond float32, a loss in float32 is Inf.
    if (!(::fabs(value) <= FLT_MAX)) return value != value ? MemberCause::loss_nan : MemberCause::loss_inf;
    if (!(norm <= DBL_MAX)) return MemberCause::gradient;
    const double clip = job().clip_norm, applied = clip > 0.0 && norm > clip ? clip : norm;
    return update(norm > applied ? static_cast<float>(applied / norm) : 1.f, applied) ? MemberCause::none
                                                                                      : MemberCause::update;
  }

  // Of a batch's rows, what they count.
  MLPKIT_DEVICE double weight_of(int begin, int count) const {
    if (!launch_.table.weights) return count;
    double sum = 0.0;
    for (int n = thread(); n < count; n += threads()) {
      float weight;
      device::load(launch_.table.weights + static_cast<int32_t>(device::load4(order() + begin + n)), weight);
      sum += weight;
    }
    return this->sum_of_block(sum);
  }

  MLPKIT_DEVICE OptimizerSettings settings() const {
    GuardedGroup group = job().group;
    const MemberHead& all = head();
    double factor = 1.0, power[2] = {0.0, 0.0};
    if (job().factors) device::load(job().factors + (all.now.step - all.begun_step), factor);
    if (job().powers) {
      device::load(job().powers + 2 * (all.now.taken - all.begun_taken), power[0]);
      device::load(job().powers + 2 * (all.now.taken - all.begun_taken) + 1, power[1]);
    }
    group.lr = job().group.lr * factor;
    return rounded<float>(
        settings_at(job().optimizer, group, static_cast<double>(all.now.taken + 1), power[0], power[1]));
  }

  // Whether the update was made: what could overflow is computed once without being written.
  MLPKIT_DEVICE bool update(float scale, double largest_gradient) {
    const float seen = largest_in(head().largest, warps());
    const bool proven =
        job().modest && largest_gradient <= kMemberLargest && seen <= static_cast<float>(kMemberLargest);
    for (bool writes = proven;; writes = true) {
      device::sync();
      largest_seen(head().largest, update_all(scale, writes));
      if (writes) return true;
      device::sync();
      if (largest_in(head().largest, warps()) <= FLT_MAX) continue;
      // What was before is still there, and is not known to be small.
      device::sync();
      largest_seen(head().largest, math::bits_as<uint32_t>(FLT_MAX));
      return false;
    }
  }

  MLPKIT_DEVICE uint32_t update_all(float scale, bool writes) {
    switch (head().settings.kind) {
      case Optimizer::sgd:
        return update_member<T, Sgd>(*this, job(), head().settings, gradients(), scale, writes);
      case Optimizer::rmsprop:
        return update_member<T, Rmsprop>(*this, job(), head().settings, gradients(), scale, writes);
      default:
        return update_member<T, Adam>(*this, job(), head().settings, gradients(), scale, writes);
    }
  }

  // One thread: a step was tried.
  MLPKIT_DEVICE void count_step(MemberCause cause) {
    MemberHead& all = head();
    MemberNow& now = all.now;
    const bool last = ++all.batch == job().steps;
    ++now.step;
    if (cause == MemberCause::none) {
      now.skips_in_a_row = 0;
      ++now.taken;
      ++all.taken;
      if (all.counted == 0.0) return;
      all.loss += loss_of_scores() * loss_scale() * all.counted;
      all.weight += all.counted;
      return;
    }
    ++now.skipped;
    if (++now.skips_in_a_row >= kMemberMostSkips) diverge(cause, now.step - kMemberMostSkips);
    if (last && all.taken == 0) diverge(cause, now.step - job().steps);
  }
  MLPKIT_DEVICE void diverge(MemberCause cause, int64_t step) {
    MemberNow& now = head().now;
    if (now.status != MemberStatus::alive) return;
    now.status = MemberStatus::diverged;
    now.cause = cause;
    now.stopped_step = step;
  }

  MLPKIT_DEVICE void end_epoch() {
    const bool scored = job().validation_rows > 0 && alive();
    const MemberScore score = scored ? score_of_epoch() : MemberScore{kNotScored, kNotScored};
    device::sync();
    if (thread() == 0) {
      MemberHead& all = head();
      const int64_t epoch = all.now.epochs_of_launch;
      device::store(job().train_loss + epoch, all.loss / all.weight);
      device::store(job().validation_loss + epoch, score.loss);
      device::store(job().metric + epoch, score.metric);
      device::store(&all.next, 0u);
      all.loss = all.weight = 0.0;
      all.taken = all.batch = 0;
      if (scored) judge(score);
      ++all.now.epoch;
      ++all.now.epochs_of_launch;
      if (alive() && all.now.epoch >= job().last_epoch) all.now.status = MemberStatus::epochs;
    }
    device::sync();
    uint32_t better;
    device::load(&head().next, better);
    if (better)
      for (int at = 4 * thread(); at < plan().floats; at += 4 * threads())
        device::store_bits16(job().best + at, device::load_bits16(job().values + at));
    device::sync();
  }

  // One thread: best epoch and patience by the metric.
  MLPKIT_DEVICE void judge(const MemberScore& score) {
    MemberNow& now = head().now;
    if (!(::fabs(score.loss) <= DBL_MAX && ::fabs(score.metric) <= DBL_MAX))
      return diverge(MemberCause::validation, now.step - 1);
    const PopulationMetric metric = launch_.task.metric;
    const bool higher = metric == PopulationMetric::accuracy || metric == PopulationMetric::r2;
    const double sign = higher ? 1.0 : -1.0;
    const bool begins = now.best_epoch < 0;
    if (begins || sign * score.metric > sign * now.best) {
      now.best = score.metric;
      now.best_epoch = now.epoch;
      device::store(&head().next, 1u);
    }
    if (begins || sign * (score.metric - now.mark) > job().min_delta) {
      now.mark = score.metric;
      now.waited = 0;
    } else if (++now.waited >= job().patience && job().patience > 0) {
      now.status = MemberStatus::patience;
    }
  }

  MLPKIT_DEVICE bool by_column() const {
    return launch_.task.metric != PopulationMetric::loss && launch_.task.metric != PopulationMetric::accuracy;
  }
  MLPKIT_DEVICE double* columns() const {
    return launch_.columns + static_cast<int64_t>(kColumnSums) * this->outputs() * device::block_index();
  }
  MLPKIT_DEVICE void score_columns(const MemberLoss& loss, bool first) const {
    const int32_t pivot = static_cast<int32_t>(device::load4(job().validation_row));
    const ColumnRows rows{this->floats(plan().logits), plan().logits_stride,
                          reinterpret_cast<const uint32_t*>(this->shared() + plan().index), this->floats(plan().by_row),
                          this->rows_};
    add_columns(loss, rows, pivot, first, this->warp(), warps(), columns());
    device::sync();
  }

  MLPKIT_DEVICE MemberScore score_of_epoch() const {
    const PopulationMetric metric = launch_.task.metric;
    const double weight = this->sum_of_warps(head().scores + 1, 3), outputs = static_cast<double>(this->outputs());
    const double value = loss_of_scores() / (weight * (launch_.table.classes ? 1.0 : outputs));
    if (metric == PopulationMetric::loss) return {value, value};
    if (!by_column()) return {value, this->sum_of_warps(head().scores + 2, 3) / weight};
    double of_thread = 0.0;
    for (int col = thread(); col < this->outputs(); col += threads())
      of_thread += score_of_column(metric, columns() + col * kColumnSums, weight);
    const double mean = this->sum_of_block(of_thread) / outputs;
    return {value, metric == PopulationMetric::rmse ? ::sqrt(mean) : mean};
  }

  const MemberLaunch& launch_;
};

// Outputs of one member for all rows, in eval.
template <class T>
class MemberPrediction : public MemberPass<T> {
  using Pass = MemberPass<T>;
  using Pass::head, Pass::job, Pass::plan, Pass::thread, Pass::threads;

 public:
  MLPKIT_DEVICE MemberPrediction(const MemberOutputs& asked) : Pass(asked.warps), asked_(asked) {}

  MLPKIT_DEVICE void run() {
    for (;;) {
      if (thread() == 0) device::store(&head().next, device::atomic_add(asked_.next, 1));
      device::sync();
      uint32_t next;
      device::load(&head().next, next);
      if (next >= static_cast<uint32_t>(asked_.count)) return;
      this->take(asked_.jobs + next);
      this->load_weights(job().values);
      for (int64_t first = 0; first < asked_.rows; first += plan().rows) predict(first);
      device::sync();
    }
  }

 private:
  MLPKIT_DEVICE void predict(int64_t first) {
    const int64_t left = asked_.rows - first;
    const int rows = left < plan().rows ? static_cast<int>(left) : plan().rows, outputs = this->outputs();
    this->gather(asked_.table, nullptr, first, rows);
    this->forward(false);
    float* y = job().outputs + first * outputs;
    for (int at = thread(); at < rows * outputs; at += threads()) {
      float z;
      device::load(this->floats(plan().logits) + at / outputs * plan().logits_stride + at % outputs, z);
      device::store(y + at, z);
    }
    device::sync();
  }

  const MemberOutputs& asked_;
};

// Registers for 16 warps a multiprocessor: two blocks of eight, or more of fewer.
template <class T>
MLPKIT_KERNEL(kMemberThreads, 2)
train_queue(const MemberLaunch launch) {
  if constexpr (device::kTensorCores) MemberTraining<T>(launch).run();
}
template <class T>
MLPKIT_KERNEL(kMemberThreads, 2)
predict_queue(const MemberOutputs asked) {
  if constexpr (device::kTensorCores) MemberPrediction<T>(asked).run();
}

}  // namespace

cudaError_t train_members(const MemberLaunch& launch, cudaStream_t stream) {
  if (device::capability() < 80) return cudaErrorNoKernelImageForDevice;
  const device::Grid grid{launch.blocks, 32 * launch.warps, launch.shared_bytes, true};
  if (launch.dtype == Dtype::float32) return device::launch(train_queue<float>, grid, stream, launch);
  return device::launch(train_queue<BFloat16>, grid, stream, launch);
}

cudaError_t predict_members(const MemberOutputs& asked, cudaStream_t stream) {
  if (device::capability() < 80) return cudaErrorNoKernelImageForDevice;
  const device::Grid grid{asked.blocks, 32 * asked.warps, asked.shared_bytes, true};
  if (asked.dtype == Dtype::float32) return device::launch(predict_queue<float>, grid, stream, asked);
  return device::launch(predict_queue<BFloat16>, grid, stream, asked);
}

}  // namespace mlpkit::cuda
