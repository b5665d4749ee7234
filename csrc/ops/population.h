// Many MLPs trained at once, each by one thread through whole epochs, and each as if alone (ops).
#pragma once
#include <atomic>
#include <functional>
#include <memory>

#include "ops/population_device.h"

namespace mlpkit {

// How far a call of train is.
struct PopulationTally {
  int64_t steps = 0, running = 0, stopped = 0;  // members: those that go on, and that diverged or lost patience
  double share = 0.0;                           // of the work, done or not needed any more
  double best = 0.0;                            // of the metrics of the epochs so far; NaN where there are none
};

class Population {
 public:
  // device: the number of a CUDA device, or -1 for the processor's threads.
  Population(PopulationTask task, PopulationData data, PopulationData validation, int device)
      : task_(task), data_(std::move(data)), validation_(std::move(validation)) {
    if (device >= 0) device_ = std::make_unique<PopulationDevice>(device, task_, data_, validation_);
  }

  // Ids count from 0.
  int64_t add(MemberNetwork network, MemberRecipe recipe, at::Tensor rows, at::Tensor validation_rows);
  PopulationMember& member(int64_t id) { return *members_.at(id); }
  // The same with its state as it stands, which may be written.
  PopulationMember& fetched(int64_t id) {
    if (device_) device_->fetch(member(id));
    return member(id);
  }
  // Why a member cannot be trained where this population is; empty if it can.
  std::string obstacle(const MemberNetwork& network, const MemberRecipe& recipe, int64_t rows) const {
    return device_ ? device_->obstacle(network, recipe, rows) : "";
  }
  int64_t count() const { return static_cast<int64_t>(members_.size()); }

  // Up to `epochs` more epochs of the members named that are alive, none beyond its own last one. `poll` is called
  // every tenth of a second on the calling thread; it returns whether to go on, otherwise every member stops after the
  // epoch it is in. in_order: as they are named, not the longest first. Returns the steps done.
  using Poll = std::function<bool(const PopulationTally&)>;
  int64_t train(const std::vector<int64_t>& ids, int64_t epochs, int64_t threads, const Poll& poll, bool in_order);
  // Outputs [members, rows, out] of x [rows, in].
  at::Tensor predict(const std::vector<int64_t>& ids, const at::Tensor& x, bool best, int64_t threads);

 private:
  int64_t train_on_device(std::vector<MemberPlace> queue, const Poll& poll, PopulationTally tally);
  void tell(PopulationTally& tally, const MemberPlace& place, double all, int64_t done, int64_t new_epochs) const;

  PopulationTask task_;
  PopulationData data_, validation_;
  std::unique_ptr<PopulationDevice> device_;
  std::vector<std::unique_ptr<PopulationMember>> members_;
};

}  // namespace mlpkit
