// What an epoch of a member needs beside its steps (cuda): the order of its rows, and scores by columns of outputs.
#pragma once
#include "core/shuffle.h"
#include "cuda/population_loss.h"

namespace mlpkit::cuda {

// Brings `order` into the epoch's order of rows: the sequence of exchanges of core/shuffle.h, of which a block makes as
// many at once as have no position in common with an earlier one that is still to be made (Shun, Gu, Blelloch, Fineman,
// Gibbons: "Sequential random permutation, list contraction and tree contraction are highly parallel", 2015).
// reserved: [count]; flags: [warps], in shared memory.
MLPKIT_DEVICE void shuffle_rows(const int32_t* rows, int count, uint64_t seed, uint32_t epoch, int32_t* order,
                                uint32_t* reserved, uint32_t* flags, int threads) {
  const int thread = static_cast<int>(device::thread_index());
#pragma unroll 1
  for (int n = thread; n < count; n += threads) {
    device::store4(order + n, device::load4(rows + n));
    device::store(reserved + n, 0u);
  }
  device::sync();
  Dropout draws;
  draws.seed = seed;
  draws.offset = epoch;
  draws.stream = kShuffleStream;
  for (int first = 0; first + 1 < count; first += threads) {
    const int n = first + thread, last = count - 1 - n;
    const Words words = mask_words(draws, static_cast<uint64_t>(n / 128), static_cast<uint32_t>(n % 128 / 4));
    const uint32_t low = n % 2 ? words.v[1] : words.v[0], high = n % 2 ? words.v[3] : words.v[2];
    const int from =
        last > 0 ? static_cast<int>(draw_below(static_cast<uint32_t>(last + 1), n % 4 < 2 ? low : high)) : 0;
    // Earlier exchanges go first. Where nothing is exchanged nothing waits.
    const uint32_t rank = static_cast<uint32_t>(threads - thread);
    bool pending = last > 0 && from != last;
    for (bool any = true; any;) {
      if (pending) {
        device::atomic_max(reserved + last, rank);
        device::atomic_max(reserved + from, rank);
      }
      device::sync();
      bool made = false;
      if (pending) {
        uint32_t at_last, at_from;
        device::load(reserved + last, at_last);
        device::load(reserved + from, at_from);
        made = at_last == rank && at_from == rank;
        if (made) {
          const uint32_t moved = device::load4(order + last);
          device::store4(order + last, device::load4(order + from));
          device::store4(order + from, moved);
        }
      }
      device::sync();
      if (pending) {
        device::store(reserved + last, 0u);
        device::store(reserved + from, 0u);
      }
      pending = pending && !made;
      const uint32_t waiting = device::ballot(pending);
      if (thread % device::kWarp == 0) device::store(flags + thread / device::kWarp, waiting);
      device::sync();
      any = false;
      for (int warp = 0; warp < threads / device::kWarp; ++warp) {
        uint32_t flag;
        device::load(flags + warp, flag);
        any = any || flag != 0;
      }
    }
  }
  device::sync();
}

struct MemberScore {
  double loss, metric;
};
constexpr double kNotScored = __builtin_nan("");

// Sums over the rows scored so far, of each column: weight times |error|, error^2, t - pivot and (t - pivot)^2, where
// the pivot is the first row's target t. sums: [columns, kColumnSums], each warp's own columns.
constexpr int kColumnSums = 4;

struct ColumnRows {  // of a pass, in shared memory
  const float* logits;
  int stride;
  const uint32_t* index;
  const float* by_row;
  int rows;
};

MLPKIT_DEVICE float target_of(const MemberTable& table, int32_t row, int outputs, int col) {
  float target;
  device::load(table.target + static_cast<int64_t>(row) * outputs + col, target);
  return target;
}

MLPKIT_DEVICE void add_columns(const MemberLoss& loss, const ColumnRows& rows, int32_t pivot_row, bool first, int warp,
                               int warps, double* sums) {
  const int lane = static_cast<int>(device::thread_index() % device::kWarp);
  for (int col = warp; col < loss.outputs; col += warps) {
    double of_lane[kColumnSums] = {};
    const double pivot = target_of(loss.table, pivot_row, loss.outputs, col);
#pragma unroll 1
    for (int r = lane; r < rows.rows; r += device::kWarp) {
      float weight, y;
      device::load(rows.by_row + r, weight);
      if (weight == 0.f) continue;
      device::load(rows.logits + r * rows.stride + col, y);
      const int32_t row = static_cast<int32_t>(device::load4(rows.index + r));
      const double t = target_of(loss.table, row, loss.outputs, col), error = y - t;
      of_lane[0] += weight * ::fabs(error);
      of_lane[1] += weight * error * error;
      of_lane[2] += weight * (t - pivot);
      of_lane[3] += weight * (t - pivot) * (t - pivot);
    }
#pragma unroll
    for (int n = 0; n < kColumnSums; ++n) {
#pragma unroll
      for (int lanes = 1; lanes < device::kWarp; lanes *= 2) of_lane[n] += device::shuffle_xor(of_lane[n], lanes);
      if (lane != 0) continue;
      double before = 0.0;
      if (!first) device::load(sums + col * kColumnSums + n, before);
      device::store(sums + col * kColumnSums + n, before + of_lane[n]);
    }
  }
}

// What a column adds to the metric, which is the mean over columns (rmse: its root).
MLPKIT_DEVICE double score_of_column(PopulationMetric metric, const double* sums, double weight) {
  double of[kColumnSums];
#pragma unroll
  for (int n = 0; n < kColumnSums; ++n) device::load(sums + n, of[n]);
  if (metric == PopulationMetric::mae) return of[0] / weight;
  if (metric == PopulationMetric::rmse) return of[1] / weight;
  const double spread = of[3] - of[2] * of[2] / weight;
  // Of a constant target: 1 if it is met, else 0.
  return spread > 0.0 ? 1.0 - of[1] / spread : of[1] == 0.0 ? 1.0 : 0.0;
}

}  // namespace mlpkit::cuda
