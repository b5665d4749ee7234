// The dropout mask of one 16x16 tile, computed on whole vectors; bit for bit the contract of core/dropout_mask.h (cpu).
#pragma once
#include "core/dropout_mask.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

class MaskTile {
 public:
  // All 32 Philox calls of a tile, half a vector of lanes at a time: every 64-bit lane carries one 32-bit word, whose
  // upper half may hold anything, because the multiplication reads the lower half only.
  MLPKIT_HD void fill(const Dropout& dropout, uint64_t tile) {
    constexpr int lanes = kLanes / 2;
    for (int first = 0; first < kMaskLanes; first += lanes) {
      LongVec lane;
      for (int i = 0; i < lanes; ++i) lane[i] = first + i;
      LongVec c0 = LongVec{} + static_cast<uint32_t>(tile), c1 = lane | (static_cast<uint32_t>(tile >> 32) << 5);
      LongVec c2 = LongVec{} + dropout.offset, c3 = LongVec{} + dropout.stream;
      uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < kPhiloxRounds; ++round) {
        const LongVec product0 = multiply_low(c0, kPhiloxMultiplier0), product1 = multiply_low(c2, kPhiloxMultiplier1);
        c0 = (product1 >> 32) ^ c1 ^ key0;
        c2 = (product0 >> 32) ^ c3 ^ key1;
        c1 = product1;
        c3 = product0;
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
      }
      put(0, first, c0);
      put(1, first, c1);
      put(2, first, c2);
      put(3, first, c3);
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
  MLPKIT_HD void put(int word, int first, LongVec lanes) {
    typedef uint32_t Narrow __attribute__((vector_size(kLanes * 2)));
    store_bits(&words_[word][first], __builtin_convertvector(lanes, Narrow));
  }

  alignas(64) uint32_t words_[4][kMaskLanes];
};

MLPKIT_END_ISA
