// The threads of a population: a queue of members, longest first, from which every thread takes the next (ops).
#include "ops/population.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "ops/population_run.h"
#include "ops/population_scores.h"

namespace mlpkit {
namespace {

// Runs work(i, workspace) for i below count on threads of its own, and poll() meanwhile on the calling one. The first
// exception of either ends the queue and is thrown here.
class Crew {
 public:
  template <class Work, class Poll>
  void run(int64_t count, int64_t threads, const Work& work, const Poll& poll) {
    std::vector<std::thread> crew;
    const int64_t size = std::max<int64_t>(1, std::min(threads, count));
    running_ = size;
    for (int64_t i = 0; i < size; ++i) crew.emplace_back([&] { take_all(count, work); });
    std::unique_lock<std::mutex> lock(mutex_);
    while (!ended_.wait_for(lock, std::chrono::milliseconds(100), [&] { return running_ == 0; })) {
      lock.unlock();
      try {
        poll();
      } catch (...) {
        fail();
      }
      lock.lock();
    }
    lock.unlock();
    for (std::thread& thread : crew) thread.join();
    if (error_) std::rethrow_exception(error_);
  }
  void stop() { stopped_ = true; }
  bool stopped() const { return stopped_; }

 private:
  template <class Work>
  void take_all(int64_t count, const Work& work) {
    try {
      PopulationWorkspace workspace;
      for (int64_t i = next_++; i < count && !stopped_; i = next_++) work(i, workspace);
    } catch (...) {
      fail();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    --running_;
    ended_.notify_all();
  }
  void fail() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    stopped_ = true;
  }

  std::atomic<int64_t> next_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable ended_;
  int64_t running_ = 0;
  std::exception_ptr error_;
};

}  // namespace

int64_t Population::add(MemberNetwork network, MemberRecipe recipe, at::Tensor rows, at::Tensor validation_rows) {
  members_.push_back(std::make_unique<PopulationMember>(std::move(network), std::move(recipe), std::move(rows),
                                                        std::move(validation_rows)));
  return count() - 1;
}

int64_t Population::train(const std::vector<int64_t>& ids, int64_t epochs, int64_t threads, const Poll& poll,
                          bool in_order) {
  std::vector<MemberPlace> queue;
  double all = 0.0;
  for (const int64_t id : ids) {
    PopulationMember& one = member(id);
    const int64_t left = std::min(epochs, one.recipe.epochs - one.progress.epoch);
    if (one.progress.status != "alive" || left <= 0) continue;
    queue.push_back({&one, left, one.work_per_epoch() * static_cast<double>(left)});
    all += queue.back().work;
  }
  if (!in_order)
    std::stable_sort(queue.begin(), queue.end(),
                     [](const MemberPlace& a, const MemberPlace& b) { return a.work > b.work; });
  PopulationTally tally{0, static_cast<int64_t>(queue.size()), 0, 0.0, std::nan("")};
  if (device_) return train_on_device(std::move(queue), poll, tally);
  std::mutex mutex;
  const auto count = [&](const MemberPlace& place, int64_t steps, int64_t done) {
    const std::lock_guard<std::mutex> lock(mutex);
    tally.steps += steps;
    tell(tally, place, all, done, 1);
  };
  Crew crew;
  const auto train_one = [&](int64_t i, PopulationWorkspace& workspace) {
    const MemberPlace& place = queue[i];
    const auto begin = std::chrono::steady_clock::now();
    MemberRun run(task_, data_, validation_, *place.member, workspace);
    for (int64_t done = 1; done <= place.epochs && place.member->progress.status == "alive" && !crew.stopped(); ++done)
      count(place, run.epoch(), done);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    place.member->progress.seconds += spent.count();
  };
  crew.run(static_cast<int64_t>(queue.size()), threads, train_one, [&] {
    std::unique_lock<std::mutex> lock(mutex);
    const PopulationTally now = tally;
    lock.unlock();
    if (!poll(now)) crew.stop();
  });
  return tally.steps;
}

// A member has done `done` of its epochs, `new_epochs` of them since it was last told of.
void Population::tell(PopulationTally& tally, const MemberPlace& place, double all, int64_t done,
                      int64_t new_epochs) const {
  const MemberProgress& progress = place.member->progress;
  const bool stopped = progress.status == "diverged" || progress.status == "patience";
  tally.stopped += stopped;
  tally.running -= progress.status != "alive" || done == place.epochs;
  tally.share += place.work / all * static_cast<double>(new_epochs + (stopped ? place.epochs - done : 0)) /
                 static_cast<double>(place.epochs);
  const double sign = task_.higher_is_better() ? 1.0 : -1.0;
  for (auto metric = progress.metric.end() - new_epochs; metric != progress.metric.end(); ++metric)
    if (std::isfinite(*metric) && !(sign * *metric <= sign * tally.best)) tally.best = *metric;
}

// Launch after launch of so many epochs that each takes some tenths of a second; how many decides about no number.
int64_t Population::train_on_device(std::vector<MemberPlace> queue, const Poll& poll, PopulationTally tally) {
  double all = 0.0;
  for (const MemberPlace& place : queue) all += place.work;
  int64_t chunk = 1;
  std::vector<int64_t> done(queue.size(), 0);
  while (!queue.empty()) {
    std::vector<MemberPlace> now = queue;
    double work = 0.0;
    for (size_t i = 0; i < now.size(); ++i) {
      now[i].epochs -= done[i];
      work += now[i].member->work_per_epoch();
    }
    const auto begin = std::chrono::steady_clock::now();
    device_->train(now, chunk);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    size_t kept = 0;
    for (size_t i = 0; i < queue.size(); ++i) {
      MemberProgress& progress = queue[i].member->progress;
      const MemberLaunched& launched = device_->launched(*queue[i].member);
      progress.seconds += spent.count() * queue[i].member->work_per_epoch() / work;
      done[i] += launched.epochs;
      tally.steps += launched.steps;
      tell(tally, queue[i], all, done[i], launched.epochs);
      if (progress.status != "alive" || done[i] == queue[i].epochs) continue;
      queue[kept] = queue[i];
      done[kept++] = done[i];
    }
    queue.resize(kept);
    done.resize(kept);
    if (!poll(tally)) break;
    if (spent.count() < 0.1) chunk *= 2;
    if (spent.count() > 0.4 && chunk > 1) chunk /= 2;
  }
  return tally.steps;
}

at::Tensor Population::predict(const std::vector<int64_t>& ids, const at::Tensor& x, bool best, int64_t threads) {
  TORCH_CHECK_VALUE(!ids.empty(), "population: no members to predict with");
  if (device_) {
    std::vector<PopulationMember*> wanted;
    for (const int64_t id : ids) wanted.push_back(&member(id));
    return device_->predict(wanted, x, best);
  }
  const int64_t rows = x.size(0), out = member(ids.front()).layers.back().out;
  at::Tensor y = at::empty({static_cast<int64_t>(ids.size()), rows, out}, at::kFloat);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  Crew crew;
  const auto predict_one = [&](int64_t i, PopulationWorkspace& workspace) {
    MemberScorer(task_, member(ids[i]), best, workspace).outputs(from, rows, to + i * rows * out);
  };
  crew.run(static_cast<int64_t>(ids.size()), threads, predict_one, [] {});
  return y;
}

}  // namespace mlpkit
