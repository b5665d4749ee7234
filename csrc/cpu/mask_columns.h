// The dropout mask of a panel of 32 rows, column by column, for layouts that hold rows in lanes; bit for bit the
// contract of core/dropout_mask.h (cpu). Included by the mlp_step kernels only.
#pragma once
#include "core/dropout_mask.h"
#include "cpu/mlp_step.h"
#include "cpu/philox_lanes.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

static_assert(kPanel == 2 * kMaskTile);

// A vector of calls is of one pair of columns in either half of a tile, and of kPhiloxLanes rows, with those eight
// further down. Vectors count row by row below each pair.
MLPKIT_HD LongVec calls_of_vector(int vector) {
  const int row = vector * kPhiloxLanes % 8, pair = vector * kPhiloxLanes / 8;
  LongVec lane;
  for (int i = 0; i < kPhiloxLanes; ++i) lane[i] = 4 * i;
  return lane + static_cast<uint64_t>(4 * row + pair);
}

// Bits of a column by the upper halves of words: rows from `row` on, and those eight further down.
MLPKIT_HD void keep_column(UintVec words, uint32_t threshold, int row, uint32_t* to) {
#if defined(__AVX512F__)
  const uint16_t bits = _mm512_cmpge_epu32_mask((__m512i)words, _mm512_set1_epi32(static_cast<int>(threshold << 16)));
  __builtin_memcpy(reinterpret_cast<char*>(to) + row / 8, &bits, sizeof(bits));
#else
  const uint32_t kept = lane_mask((IntVec)((IntVec)(words >> 16) >= static_cast<int32_t>(threshold)));
  const uint32_t bits = ((kept & ((1u << kPhiloxLanes) - 1)) | kept >> kPhiloxLanes << 8) << row;
  *to = row == 0 ? bits : *to | bits;
#endif
}

// Bit r of keep[c] is set where element (32 panel + r, c) of a (rows, cols) output is kept; keep has room for whole
// tiles. 0 < threshold < 65536.
inline void mask_of_panel(const Dropout& dropout, int64_t panel, int64_t cols, uint32_t* keep) {
  const int64_t across = (cols + kMaskTile - 1) / kMaskTile;
  const uint32_t threshold = dropout.threshold;
  PhiloxTile philox(dropout);
  for (int64_t col = 0; col < across; ++col)
    for (int half = 0; half < 2; ++half) {
      philox.move_to(static_cast<uint64_t>((2 * panel + half) * across + col));
      for (int first = 0; first < kMaskLanes / kPhiloxLanes; first += kPhiloxVectors) {
        LongVec lane[kPhiloxVectors], words[kPhiloxVectors][4];
        for (int i = 0; i < kPhiloxVectors; ++i) lane[i] = calls_of_vector(first + i);
        philox.words(lane, words);
        for (int i = 0; i < kPhiloxVectors; ++i) {
          const int row = half * kMaskTile + (first + i) * kPhiloxLanes % 8, pair = (first + i) * kPhiloxLanes / 8;
          uint32_t* column = keep + col * kMaskTile + 2 * pair;
          for (int side = 0; side < 2; ++side, column += 8) {
            constexpr UintVec even = MLPKIT_EVEN_LANES;
            const UintVec rows = __builtin_shuffle((UintVec)words[i][2 * side], (UintVec)words[i][2 * side + 1], even);
            keep_column(rows << 16, threshold, row, column);
            keep_column(rows, threshold, row, column + 1);
          }
        }
      }
    }
}

MLPKIT_END_ISA
