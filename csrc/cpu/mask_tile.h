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
    Halves halves;
    for (int first = 0; first < kMaskLanes; first += kPhiloxVectors * kPhiloxLanes) {
      LongVec lane[kPhiloxVectors], words[kPhiloxVectors][4];
      for (int i = 0; i < kPhiloxVectors; ++i) lane[i] = calls_from(first + i * kPhiloxLanes);
      philox_.words(lane, words);
      for (int word = 0; word < 4; ++word)
        for (int i = 0; i < kPhiloxVectors; i += 2)
          keep_half(word, first + i * kPhiloxLanes, words[i][word], words[i + 1][word], halves);
    }
    for (int below = 0; below < 2; ++below) join(halves.bits[below], halves.bits[below + 2], keep + below * 8);
  }

 private:
  struct Halves {
    alignas(16) uint8_t bits[4][8];  // of a word of the calls: eight rows' left or right eight columns
  };

  MLPKIT_HD static LongVec calls_from(int first) {
    LongVec lane;
    for (int i = 0; i < kPhiloxLanes; ++i) lane[i] = i;
    return lane + static_cast<uint64_t>(first);
  }

#if defined(__AVX512BW__)
  // Word `word` of kLanes calls from `call` on, each of which holds two columns of a row: four rows' bits at once.
  MLPKIT_HD void keep_half(int word, int call, LongVec first, LongVec second, Halves& halves) const {
    const __m512i pairs = (__m512i)low_halves(first, second);
    const uint32_t bits = _mm512_cmpge_epu16_mask(pairs, _mm512_set1_epi16(static_cast<short>(threshold_)));
    __builtin_memcpy(halves.bits[word] + call / 4, &bits, sizeof(bits));
  }
#else
  MLPKIT_HD void keep_half(int word, int call, LongVec first, LongVec second, Halves& halves) const {
    uint32_t pairs[kLanes];
    store_bits(pairs, low_halves(first, second));
    for (int i = 0; i < kLanes; i += 4) halves.bits[word][(call + i) / 4] = keep_row(pairs + i);
  }
  // Bits of eight columns, two in a word.
  MLPKIT_HD uint8_t keep_row(const uint32_t* pairs) const {
#if defined(__SSE2__)
    // SSE2 compares signed words only: both sides are shifted by 2^15.
    const __m128i bias = _mm_set1_epi16(-32768), limit = _mm_set1_epi16(static_cast<short>((threshold_ - 1) ^ 0x8000));
    const __m128i words = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)), bias);
    const __m128i kept = _mm_cmpgt_epi16(words, limit);
    return static_cast<uint8_t>(_mm_movemask_epi8(_mm_packs_epi16(kept, kept)));
#else
    unsigned bits = 0;
    for (int c = 0; c < 8; ++c) bits |= ((c & 1 ? pairs[c / 2] >> 16 : pairs[c / 2] & 0xffffu) >= threshold_) << c;
    return static_cast<uint8_t>(bits);
#endif
  }
#endif

  MLPKIT_HD static void join(const uint8_t* left, const uint8_t* right, uint16_t* rows) {
#if defined(__SSE2__)
    const __m128i lefts = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(left));
    const __m128i rights = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(right));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rows), _mm_unpacklo_epi8(lefts, rights));
#else
    for (int r = 0; r < 8; ++r) rows[r] = static_cast<uint16_t>(left[r] | right[r] << 8);
#endif
  }

  PhiloxTile philox_;
  uint32_t threshold_;
};

MLPKIT_END_ISA
