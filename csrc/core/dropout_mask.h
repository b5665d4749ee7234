// The dropout-mask contract (core; host and device): which 16 random bits decide about which element.
//
// The (rows, cols) output is cut into 16x16 tiles, ragged edges included; tile = row_tile * ceil(cols / 16) + col_tile.
// Lane l = (r mod 8) * 4 + (c mod 8) / 2 of a tile makes one Philox call with counter (tile lo, tile hi << 5 | l,
// offset, stream) and the 64-bit seed as key. Its word w serves row r + 8 (w & 1), in the left 8 columns if w < 2 and
// the right 8 otherwise; the low half of the word is the even column, the high half the odd one. That is the
// accumulator fragment of an m16n8 tensor-core product. Only logical coordinates enter: never a thread, a block or a
// kernel's tile shape.
#pragma once
#include "core/macros.h"
#include "core/philox.h"

namespace mlpkit {

constexpr int kMaskTile = 16;
constexpr int kMaskLanes = 32;

// drop if u16 < threshold; survivors are multiplied by scale. threshold 0 means no dropout, 65536 means everything is
// dropped.
struct Dropout {
  uint64_t seed = 0;
  uint32_t offset = 0, stream = 0;
  uint32_t threshold = 0;
  double scale = 1.0;
};

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// threshold = round(65536 p), scale = 65536 / (65536 - threshold): unbiased for the p that is realised.
MLPKIT_HD uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 65536.0 + 0.5); }
MLPKIT_HD double dropout_scale(uint32_t threshold) {
  return threshold >= 65536 ? 0.0 : 65536.0 / (65536.0 - threshold);
}

MLPKIT_HD Words mask_words(const Dropout& dropout, uint64_t tile, uint32_t lane) {
  const Words counter = {
      {static_cast<uint32_t>(tile), (static_cast<uint32_t>(tile >> 32) << 5) | lane, dropout.offset, dropout.stream}};
  return philox4x32(counter, static_cast<uint32_t>(dropout.seed), static_cast<uint32_t>(dropout.seed >> 32));
}

// The 16 bits of element (r, c), 0 <= r, c < 16, of a tile, out of the words of lane (r mod 8) * 4 + (c mod 8) / 2.
MLPKIT_HD uint32_t mask_lane(int r, int c) { return static_cast<uint32_t>((r & 7) * 4 + (c & 7) / 2); }
MLPKIT_HD uint32_t mask_bits(const Words& words, int r, int c) {
  const uint32_t word = words.v[(r >> 3) + 2 * (c >> 3)];
  return c & 1 ? word >> 16 : word & 0xffffu;
}

MLPKIT_END_ISA
