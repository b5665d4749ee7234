// The dropout mask of 16 rows, column by column, for layouts that hold rows in lanes; bit for bit the contract of
// core/dropout_mask.h (cpu).
#pragma once
#include "core/dropout_mask.h"
#include "cpu/philox_lanes.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

// Rows of a vector of 32-bit words whose upper or lower half is at least the threshold, one bit each.
MLPKIT_HD unsigned kept_lanes(UintVec halves, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)halves, _mm512_set1_epi32(static_cast<int>(threshold)));
#else
  return lane_mask((IntVec)((IntVec)halves >= static_cast<int32_t>(threshold)));
#endif
}

class MaskColumns {
 public:
  // The 32 Philox calls of a tile, in the order (column pair, row mod 8), so that the words of a column are neighbours.
  MLPKIT_HD void fill(const Dropout& dropout, uint64_t tile) {
    const PhiloxTile philox(dropout, tile);
    for (int first = 0; first < kMaskLanes; first += kPhiloxVectors * kPhiloxLanes) {
      LongVec lane[kPhiloxVectors], words[4][kPhiloxVectors];
      for (int i = 0; i < kPhiloxVectors * kPhiloxLanes; ++i)
        lane[i / kPhiloxLanes][i % kPhiloxLanes] = ((first + i) & 7) * 4 + (first + i) / 8;
      philox.words(lane, words);
      for (int i = 0; i < kPhiloxVectors; ++i) {
        const int pair = (first + i * kPhiloxLanes) / 8, row = (first + i * kPhiloxLanes) % 8;
        for (int word = 0; word < 4; ++word)
          store_low_halves(&words_[word / 2][pair][row + word % 2 * 8], words[word][i]);
      }
    }
  }

  // Column c of the tile: bit r is set where element (r, c) is kept. 0 < threshold < 65536.
  MLPKIT_HD unsigned keep(int c, uint32_t threshold) const {
    const uint32_t* words = words_[c >> 3][(c & 7) >> 1];
    unsigned mask = 0;
    for (int r = 0; r < kMaskTile; r += kLanes) {
      const UintVec word = load_bits<UintVec>(words + r);
      mask |= kept_lanes(c & 1 ? word >> 16 : word & 0xffffu, threshold) << r;
    }
    return mask;
  }

 private:
  alignas(64) uint32_t words_[2][4][kMaskTile];  // half of the columns, pair of columns, row
};

// Bit r of keep[c] is set where element (32 panel + r, c) of a (rows, cols) output is kept; keep has room for whole
// tiles.
MLPKIT_HD void mask_of_panel(const Dropout& dropout, int64_t panel, int64_t cols, uint32_t* keep) {
  const int64_t across = (cols + kMaskTile - 1) / kMaskTile;
  MaskColumns tile;
  for (int half = 0; half < 2; ++half)
    for (int64_t col = 0; col < across; ++col) {
      tile.fill(dropout, static_cast<uint64_t>((2 * panel + half) * across + col));
      for (int c = 0; c < kMaskTile; ++c) {
        const uint32_t bits = tile.keep(c, dropout.threshold);
        uint32_t& both = keep[col * kMaskTile + c];
        both = half ? both | bits << 16 : bits;
      }
    }
}

MLPKIT_END_ISA
