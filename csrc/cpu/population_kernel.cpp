// The order of an epoch's rows (cpu; compiled once for each instruction set).
#include "cpu/population.h"

#include "cpu/philox_lanes.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr int64_t kDraws = 4 * kMaskLanes;  // of a tile

// Draws kDraws tile and on: word w of lane l is draws[4 l + w].
void draw_tile(PhiloxTile& philox, int64_t tile, uint32_t* draws) {
  philox.move_to(static_cast<uint64_t>(tile));
  for (int first = 0; first < kMaskLanes; first += kPhiloxVectors * kPhiloxLanes) {
    LongVec lane[kPhiloxVectors], words[kPhiloxVectors][4];
    for (int i = 0; i < kPhiloxVectors; ++i)
      for (int j = 0; j < kPhiloxLanes; ++j) lane[i][j] = static_cast<uint64_t>(first + i * kPhiloxLanes + j);
    philox.words(lane, words);
    for (int i = 0; i < kPhiloxVectors; ++i)
      for (int j = 0; j < kPhiloxLanes; ++j)
        for (int w = 0; w < 4; ++w)
          draws[4 * (first + i * kPhiloxLanes + j) + w] = static_cast<uint32_t>(words[i][w][j]);
  }
}

}  // namespace

void shuffle_rows(const ShuffleRows& args) {
  PhiloxTile philox(Dropout{args.seed, args.epoch, kShuffleStream});
  uint32_t draws[kDraws];
  for (int64_t n = 0; n + 1 < args.count; ++n) {
    if (n % kDraws == 0) draw_tile(philox, n / kDraws, draws);
    const int64_t last = args.count - 1 - n;
    const int64_t from = draw_below(static_cast<uint32_t>(last + 1), draws[n % kDraws]);
    const int32_t moved = args.order[last];
    args.order[last] = args.order[from];
    args.order[from] = moved;
  }
}

MLPKIT_END_ISA
