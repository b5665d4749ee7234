// The loss of a block's rows and its slopes by the outputs (cuda). Eight lanes share a row, two adjacent columns of
// every sixteen each, so that a slope pair is one word of a tile.
#pragma once
#include "core/loss.h"
#include "cuda/mlp_step.h"
#include "cuda/mlp_tile.h"

namespace mlpkit::cuda {

constexpr int kLossLanes = 8, kLossRows = kMlpThreads / kLossLanes;

template <class F>
MLPKIT_DEVICE F sum_of_row(F value) {
#pragma unroll
  for (int lanes = 1; lanes < kLossLanes; lanes *= 2) value += device::shuffle_xor(value, lanes);
  return value;
}
MLPKIT_DEVICE float top_of_row(float value) {
#pragma unroll
  for (int lanes = 1; lanes < kLossLanes; lanes *= 2) {
    const float other = device::shuffle_xor(value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

struct LossRow {
  const MlpLoss& loss;
  float* logits;  // of this row, in shared memory
  int outputs;
  int first;    // column of this lane's first pair; the next is 16 further
  float scale;  // of the slopes
  int64_t row;  // of the batch
  bool counts;  // inside the batch

  template <class Body>  // body(column, logit) for every column of this lane
  MLPKIT_DEVICE void each(Body&& body) const {
    for (int pair = first; pair < outputs; pair += 16)
#pragma unroll
      for (int col = pair; col < pair + 2; ++col) {
        if (col >= outputs) continue;
        float z;
        device::load(logits + col, z);
        body(col, z);
      }
  }
  // Stores slope(column, logit) where the slopes of this row go.
  template <class T, class Slope>
  MLPKIT_DEVICE void store(T* tile_row, Slope&& slope) const {
    for (int pair = first; pair < (outputs + 15) / 16 * 16; pair += 16) {
      float of_pair[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (pair + i >= outputs) continue;
        float z;
        device::load(logits + pair + i, z);
        of_pair[i] = slope(pair + i, z);
      }
      if (tile_row)
        device::store4(tile_row + pair / 16 * kTileElements + pair % 16 / 8 * 128 + pair % 8,
                       device::narrow_pair(of_pair[0], of_pair[1], T{}));
    }
  }
  MLPKIT_DEVICE float weight_of(int64_t c) const {
    float weight = 1.f;
    if (loss.by_class) device::load(loss.by_class + c, weight);
    return weight;
  }
};

// total: the sum of all class weights. Rows beyond the batch give zeros; all lanes of a row call it together.
template <class T>
MLPKIT_DEVICE MlpValues cross_entropy_of_row(const LossRow& row, float total, T* tile_row) {
  int64_t wanted = row.loss.ignore_index;
  if (row.counts) device::load(row.loss.classes + row.row, wanted);
  const bool ignored = wanted == row.loss.ignore_index;
  const bool outside = row.counts && !ignored && (wanted < 0 || wanted >= row.outputs);
  const bool counted = row.counts && !ignored && !outside;
  const float weight = counted ? row.weight_of(wanted) : 0.f;
  float top = -__builtin_inff(), sum = 0.f, of_class = 0.f, by_weight = 0.f;
  row.each([&](int, float z) { top = z > top ? z : top; });
  top = top_of_row(top);
  row.each([&](int col, float z) {
    sum += math::exp(z - top);
    of_class = col == wanted ? z : of_class;
    by_weight += row.weight_of(col) * z;
  });
  sum = sum_of_row(sum);
  of_class = sum_of_row(of_class);
  by_weight = sum_of_row(by_weight);
  const Smoothing smoothing{row.loss.certain, row.loss.spread, total};
  // A row that does not count gives no slope, but its NaN is not hidden: the sum is finite otherwise.
  const float nothing = row.counts && ignored ? 0.f * sum : 0.f;
  row.store(tile_row, [&](int col, float z) {
    if (!counted) return nothing;
    const float share = math::exp(z - top) / sum, is_class = col == wanted ? 1.f : 0.f;
    return row.scale * cross_entropy_slope(smoothing, share, is_class, weight, row.weight_of(col));
  });
  if (row.first != 0) return {};
  const float surprise = math::log(sum) + top;
  const float spread = smoothing.spread * (smoothing.total * surprise - by_weight);
  const float value = weight * smoothing.certain * (surprise - of_class) + spread;
  return {counted ? value : 0.0, weight, outside ? 1.0 : 0.0};
}

template <class Term, class T>
MLPKIT_DEVICE MlpValues loss_of_row(const LossRow& row, T* tile_row) {
  MlpValues values{};
  row.store(tile_row, [&](int col, float z) {
    if (!row.counts) return 0.f;
    float target;
    device::load(row.loss.target + row.row * row.outputs + col, target);
    const LossTerm<float> term = Term::at(z, target, row.loss.delta);
    values.loss += term.value;
    return term.slope * row.scale;
  });
  return values;
}

template <class T>
MLPKIT_DEVICE MlpValues loss_of(const LossRow& row, float total, T* tile_row) {
  if (row.loss.kind == Loss::cross_entropy) return cross_entropy_of_row(row, total, tile_row);
  MlpValues values{};
  visit_loss(row.loss.kind, [&](auto term) { values = loss_of_row<decltype(term)>(row, tile_row); });
  return values;
}

}  // namespace mlpkit::cuda
