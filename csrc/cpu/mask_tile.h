// The dropout mask in 16x16 tiles, computed on whole vectors; bit for bit the contract of core/dropout_mask.h (cpu).
#pragma once
#include "core/dropout_mask.h"
#include "cpu/philox_lanes.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

// Of tiles drawn one after the other: the generator's keys are made once. 0 < dropout.threshold < 65536.
class MaskTiles {
 public:
  MLPKIT_HD explicit MaskTiles(const Dropout& dropout) : philox_(dropout), threshold_(dropout.threshold) {}

  // Bit c of keep[r] is set where element (r, c) is kept.
  MLPKIT_HD void draw(uint64_t tile, uint16_t (&keep)[kMaskTile]) {
    philox_.move_to(tile);
    for (int first = 0; first < kMaskLanes; first += kPhiloxVectors * kPhiloxLanes) {
      LongVec lane[kPhiloxVectors], words[kPhiloxVectors][4];
      for (int i = 0; i < kPhiloxVectors; ++i) lane[i] = calls_from(first + i * kPhiloxLanes);
      philox_.words(lane, words);
      for (int i = 0; i < kPhiloxVectors; i += 2)
        for (int below = 0; below < 2; ++below)
          keep_rows(low_halves(words[i][below], words[i + 1][below]),
                    low_halves(words[i][below + 2], words[i + 1][below + 2]),
                    keep + below * 8 + (first + i * kPhiloxLanes) / 4);
    }
  }

 private:
  MLPKIT_HD static LongVec calls_from(int first) {
    LongVec lane;
    for (int i = 0; i < kPhiloxLanes; ++i) lane[i] = i;
    return lane + static_cast<uint64_t>(first);
  }

  // From the words of kLanes calls, four to a row: those of its eight columns on the left, and on the right.
  MLPKIT_HD void keep_rows(UintVec left, UintVec right, uint16_t* rows) const {
#if defined(__AVX512BW__)
    const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold_));
    const __m128i lefts = _mm_cvtsi32_si128(static_cast<int>(_mm512_cmpge_epu16_mask((__m512i)left, limit)));
    const __m128i rights = _mm_cvtsi32_si128(static_cast<int>(_mm512_cmpge_epu16_mask((__m512i)right, limit)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows), _mm_unpacklo_epi8(lefts, rights));
#elif defined(__AVX2__)
    const __m256i limit = _mm256_set1_epi16(static_cast<short>(threshold_));
    const __m256i lefts = _mm256_cmpeq_epi16(_mm256_max_epu16((__m256i)left, limit), (__m256i)left);
    const __m256i rights = _mm256_cmpeq_epi16(_mm256_max_epu16((__m256i)right, limit), (__m256i)right);
    store_bits(rows, _mm256_movemask_epi8(_mm256_packs_epi16(lefts, rights)));
#elif defined(__SSE2__)
    // SSE2 compares signed words only: both sides are shifted by 2^15.
    const __m128i bias = _mm_set1_epi16(-32768), limit = _mm_set1_epi16(static_cast<short>((threshold_ - 1) ^ 0x8000));
    const __m128i lefts = _mm_cmpgt_epi16(_mm_xor_si128((__m128i)left, bias), limit);
    const __m128i rights = _mm_cmpgt_epi16(_mm_xor_si128((__m128i)right, bias), limit);
    rows[0] = static_cast<uint16_t>(_mm_movemask_epi8(_mm_packs_epi16(lefts, rights)));
#else
    for (int row = 0; row < kLanes / 4; ++row) {
      unsigned bits = 0;
      for (int c = 0; c < kMaskTile; ++c) {
        const int word = row * 4 + c % 8 / 2;
        const uint32_t pair = c < 8 ? left[word] : right[word];
        bits |= static_cast<unsigned>((c % 2 ? pair >> 16 : pair & 0xffffu) >= threshold_) << c;
      }
      rows[row] = static_cast<uint16_t>(bits);
    }
#endif
  }

  PhiloxTile philox_;
  uint32_t threshold_;
};

MLPKIT_END_ISA
