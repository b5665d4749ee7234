// The guarded update of a list of tensors by one optimizer: taken whole or left alone (ops).
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <limits>
#include <vector>

#include "core/guarded_update.h"
#include "cpu/guarded_update.h"

namespace mlpkit {

// One parameter with its state; undefined where the optimizer keeps none. All have p's sizes, strides and dtype.
struct GuardedRow {
  at::Tensor p, first, second, third;
  at::Tensor copy;  // p in float16 or bfloat16
  at::Tensor step;  // float32 or float64, one element: steps taken
  int64_t group = 0;
  bool fresh = false;  // where there is no step: whether sgd's momentum buffer is empty
  std::array<const at::Tensor*, 4> state() const { return {&p, &first, &second, &third}; }
};

// Whether a tensor lies in memory as these strides say; those of dimensions of size 1 say nothing.
bool same_layout(const at::Tensor& tensor, at::IntArrayRef strides);

// Where a row's tensors lay and how often they had been changed.
struct Seen {
  const void* data[4] = {};
  uint32_t version[4] = {};
  bool operator==(const Seen&) const = default;
};
Seen seen(const GuardedRow& row);

struct GuardedOptions {
  double clip = std::numeric_limits<double>::infinity();  // largest global norm
  at::Tensor scale, clean;  // float32 and int32, one element: the loss scale and the clean steps since it changed
  at::Tensor found;         // float32, one element: not 0 skips the step; 1 after a step that its gradients forbade
  GuardedScale rule{2.0, 0.5, 1.0, 0x1p24, 0};
  bool force = false;  // write whatever comes out
  // Unscale the gradients in place first, be they bad or not, as torch's scaler does; not with force.
  bool unscale = false;
  // Update by the operations of torch.optim's own optimizers, bit for bit, gradients scaled and clipped in place first;
  // not with force. A step that no bound shows to stay finite is not taken.
  bool torch = false;
  std::vector<uint8_t>
      fused;  // then, by group: whether by its fused kernels; the rows of such a group are of one dtype
};

struct GuardedOutcome {
  bool taken;
  GuardedReason reason;
  double norm, factor;    // of the unscaled gradients before clipping; what they were multiplied by
  int64_t row;            // the first one at fault, or -1
  int64_t rows;           // how many gradients hold Inf or NaN
  bool unscaled = false;  // whether the gradients now are
};

class GuardedUpdate {
 public:
  // Raises TypeError or ValueError for tensors that do not fit each other.
  GuardedUpdate(Optimizer kind, std::vector<GuardedRow> rows);
  // gradients: by row, undefined where a row takes no part. groups: settings by group.
  GuardedOutcome run(const std::vector<at::Tensor>& gradients, const std::vector<GuardedGroup>& groups,
                     const GuardedOptions& options);
  // Of the last run's gradients, by row; unscaled where that run has unscaled them, by a factor of unscaled_by().
  const std::vector<RangeCensus>& census() const { return census_; }
  double unscaled_by() const { return unscaled_by_; }
  // Upper bounds of each row as the last run left them; NaN in p: unknown, read them in the next run.
  std::vector<Extents>& extents() { return extents_; }
  // Take the extents for true although this object has not seen the tensors before.
  void trust_extents() {
    for (size_t i = 0; i < rows_.size(); ++i) seen_[i] = seen(rows_[i]);
  }
  std::vector<GuardedRow>& rows() { return rows_; }
  Optimizer kind() const { return kind_; }

 private:
  struct Chunk {
    int64_t row, begin, count;
  };
  struct Run;

  template <class Work>
  void each_chunk(const Work& work);
  bool begin_together(const std::vector<uint8_t>& active, const std::vector<uint8_t>& fused) const;
  void take_census(Run& run, double shrink, double factor);
  bool unscale(Run& run, const std::vector<at::Tensor>& given);
  void look(Run& run, const std::vector<uint8_t>& rows);
  bool decide(Run& run);
  bool bounded(Run& run);
  bool prove(Run& run);
  RangeUpdate range(const Run& run, const Chunk& chunk) const;
  void write(Run& run);
  void write_as_torch(Run& run);
  void finish(Run& run);

  Optimizer kind_;
  std::vector<GuardedRow> rows_;
  std::vector<Chunk> chunks_;
  std::vector<size_t> units_;  // the first chunk of each unit of work, and the end
  std::vector<Seen> seen_;
  std::vector<Extents> extents_;
  std::vector<RangeCensus> census_;
  double unscaled_by_ = 1;
};

}  // namespace mlpkit
