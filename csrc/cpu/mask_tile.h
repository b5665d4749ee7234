// The dropout mask of one 16x16 tile, computed on whole vectors; bit for bit the contract of core/dropout_mask.h (cpu).
#pragma once
#include "core/dropout_mask.h"
#include "cpu/philox_lanes.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

class MaskTile {
 public:
  MLPKIT_HD void fill(const Dropout& dropout, uint64_t tile) {
    PhiloxTile philox(dropout);
    philox.move_to(tile);
    for (int first = 0; first < kMaskLanes; first += kPhiloxVectors * kPhiloxLanes) {
      LongVec lane[kPhiloxVectors], words[kPhiloxVectors][4];
      for (int i = 0; i < kPhiloxVectors * kPhiloxLanes; ++i) lane[i / kPhiloxLanes][i % kPhiloxLanes] = first + i;
      philox.words(lane, words);
      for (int word = 0; word < 4; ++word)
        for (int i = 0; i < kPhiloxVectors; i += 2)
          store_low_halves(&words_[word][first + i * kPhiloxLanes], words[i][word], words[i + 1][word]);
    }
  }

  // Row r of the tile: bit c is set where element (r, c) is kept. 0 < threshold < 65536.
  MLPKIT_HD unsigned keep(int r, uint32_t threshold) const {
    const uint32_t* left = &words_[r >> 3][(r & 7) * 4];
    const uint32_t* right = &words_[(r >> 3) + 2][(r & 7) * 4];
#if defined(__AVX512BW__)
    const __m256i bits =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(left))),
                                _mm_load_si128(reinterpret_cast<const __m128i*>(right)), 1);
    return _mm256_cmpge_epu16_mask(bits, _mm256_set1_epi16(static_cast<short>(threshold)));
#elif defined(__SSE2__)
    // SSE2 compares signed words only: both sides are shifted by 2^15.
    const __m128i bias = _mm_set1_epi16(-32768), limit = _mm_set1_epi16(static_cast<short>((threshold - 1) ^ 0x8000));
    const __m128i low =
        _mm_cmpgt_epi16(_mm_xor_si128(_mm_load_si128(reinterpret_cast<const __m128i*>(left)), bias), limit);
    const __m128i high =
        _mm_cmpgt_epi16(_mm_xor_si128(_mm_load_si128(reinterpret_cast<const __m128i*>(right)), bias), limit);
    return static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
#else
    unsigned mask = 0;
    for (int c = 0; c < kMaskTile; ++c) {
      const uint32_t word = (c < 8 ? left : right)[(c & 7) / 2];
      mask |= ((c & 1 ? word >> 16 : word & 0xffffu) >= threshold ? 1u : 0u) << c;
    }
    return mask;
#endif
  }

 private:
  alignas(64) uint32_t words_[4][kMaskLanes];
};

MLPKIT_END_ISA
