// The loss of a pass's rows, its slopes by the outputs, and what they score (cuda). Eight lanes share a row, two
// adjacent columns of every sixteen each, so that a slope pair is one word of a tile.
#pragma once
#include "cuda/mlp_loss.h"
#include "cuda/population.h"
#include "cuda/population_tile.h"

namespace mlpkit::cuda {

struct MemberLoss {  // of a pass
  MemberTask task;
  Smoothing smoothing;
  float scale;  // of the slopes
  MemberTable table;
  int outputs;
};

// One row: logits in shared memory, its number in the table (-1 where the pass ends), what it counts, this lane's first
// column.
struct MemberRow {
  float* logits;
  int32_t index;
  float weight;
  int first, outputs;
  uint32_t tile_lane;  // of the row's words in a tile of slopes, and which of them: row / 8
  int lower;

  template <class Body>  // body(column, logit) for every column of this lane
  MLPKIT_DEVICE void each(Body&& body) const {
#pragma unroll 1
    for (int pair = first; pair < outputs; pair += 16)
#pragma unroll
      for (int col = pair; col < pair + 2; ++col) {
        if (col >= outputs) continue;
        float z;
        device::load(logits + col, z);
        body(col, z);
      }
  }
  // Stores slope(column, logit) in the row's tiles, or only calls it where tiles is nullptr.
  template <class T, class Slope>
  MLPKIT_DEVICE void store(T* tiles, Slope&& slope) const {
#pragma unroll 1
    for (int pair = first; pair < tiles_of(outputs) * 16; pair += 16) {
      float of_pair[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (pair + i >= outputs) continue;
        float z;
        device::load(logits + pair + i, z);
        of_pair[i] = slope(pair + i, z);
      }
      if (!tiles) continue;
      const int word = pair % 16 / 8 * 2 + lower;
      put_pair(tiles + pair / 16 * kTileElements + pair_place(tile_lane, word, T{}), of_pair[0], of_pair[1]);
    }
  }
};

struct RowScore {
  double loss = 0.0, weight = 0.0, right = 0.0;
};

template <class T>
MLPKIT_DEVICE float cross_entropy_of_member(const MemberLoss& loss, const MemberRow& row, int32_t wanted, T* tiles) {
  float top = -__builtin_inff(), sum = 0.f, of_class = 0.f, by_weight = 0.f;
  row.each([&](int, float z) { top = z > top ? z : top; });
  top = top_of_row(top);
  row.each([&](int col, float z) {
    sum += math::exp(z - top);
    of_class = col == wanted ? z : of_class;
    by_weight += z;
  });
  sum = sum_of_row(sum);
  of_class = sum_of_row(of_class);
  by_weight = sum_of_row(by_weight);
  if (tiles)
    row.store(tiles, [&](int col, float z) {
      if (row.index < 0) return 0.f;
      const float share = math::exp(z - top) / sum, is_class = col == wanted ? 1.f : 0.f;
      return loss.scale * cross_entropy_slope(loss.smoothing, share, is_class, 1.f, 1.f) * row.weight;
    });
  const float surprise = math::log(sum) + top;
  const float spread = loss.smoothing.spread * (loss.smoothing.total * surprise - by_weight);
  return loss.smoothing.certain * (surprise - of_class) + spread;
}

template <class T>
MLPKIT_DEVICE float brier_of_member(const MemberLoss& loss, const MemberRow& row, int32_t wanted, T* tiles) {
  float top = -__builtin_inff(), sum = 0.f, expected = 0.f, value = 0.f;
  row.each([&](int, float z) { top = z > top ? z : top; });
  top = top_of_row(top);
  row.each([&](int, float z) { sum += math::exp(z - top); });
  sum = sum_of_row(sum);
  const auto is_class = [&](int col) { return col == wanted ? 1.f : 0.f; };
  row.each([&](int col, float z) {
    const float share = math::exp(z - top) / sum, d = share - is_class(col);
    expected += share * d;
    value += d * d;
  });
  expected = sum_of_row(expected);
  value = sum_of_row(value);
  if (tiles)
    row.store(tiles, [&](int col, float z) {
      if (row.index < 0) return 0.f;
      return loss.scale * brier_slope(math::exp(z - top) / sum, is_class(col), expected) * row.weight;
    });
  return value;
}

template <class Term, class T>
MLPKIT_DEVICE float loss_of_member(const MemberLoss& loss, const MemberRow& row, T* tiles) {
  float sum = 0.f;
  row.store(tiles, [&](int col, float z) {
    if (row.index < 0) return 0.f;
    float target;
    device::load(loss.table.target + static_cast<int64_t>(row.index) * row.outputs + col, target);
    const LossTerm<float> term = Term::at(z, target, loss.task.delta);
    sum += term.value;
    return term.slope * loss.scale * row.weight;
  });
  return sum_of_row(sum);
}

// Whether the largest output is the class's, the first of equals; by bce, whether the first output is on the side of
// its target.
MLPKIT_DEVICE bool guessed_right(const MemberLoss& loss, const MemberRow& row, int32_t wanted) {
  float top = -__builtin_inff();
  int at = row.outputs;
  row.each([&](int col, float z) {
    const bool larger = z > top || (z == top && col < at);
    top = larger ? z : top;
    at = larger ? col : at;
  });
#pragma unroll
  for (int lanes = 1; lanes < kLossLanes; lanes *= 2) {
    const float other = device::shuffle_xor(top, lanes);
    const int other_at = device::shuffle_xor(at, lanes);
    const bool larger = other > top || (other == top && other_at < at);
    top = larger ? other : top;
    at = larger ? other_at : at;
  }
  if (loss.table.classes) return at == wanted;
  float first, target = 0.f;
  device::load(row.logits, first);
  if (row.index >= 0) device::load(loss.table.target + static_cast<int64_t>(row.index) * row.outputs, target);
  return (first > 0.f) == (target > 0.5f);
}

// All lanes of a row call it together; the sums are in the lane with the first column.
template <class T>
MLPKIT_DEVICE void score_row(const MemberLoss& loss, const MemberRow& row, T* tiles, bool wants_right, RowScore& to) {
  int32_t wanted = -1;
  if (loss.table.classes && row.index >= 0) {
    uint32_t bits = device::load4(loss.table.classes + row.index);
    wanted = static_cast<int32_t>(bits);
  }
  float value = 0.f;
  if (loss.task.loss == Loss::cross_entropy) value = cross_entropy_of_member(loss, row, wanted, tiles);
  if (loss.task.loss == Loss::brier) value = brier_of_member(loss, row, wanted, tiles);
  visit_loss(loss.task.loss, [&](auto term) { value = loss_of_member<decltype(term)>(loss, row, tiles); });
  const bool right = wants_right && guessed_right(loss, row, wanted);
  if (row.first != 0 || row.index < 0) return;
  to.loss += value * row.weight;
  to.weight += row.weight;
  to.right += right ? row.weight : 0.f;
}

}  // namespace mlpkit::cuda
