// The Philox calls of one mask tile on whole vectors; bit for bit core/philox.h on the counters of core/dropout_mask.h
// (cpu).
#pragma once
#include "core/dropout_mask.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

#if defined(__AVX512F__)
#define MLPKIT_EVEN_LANES {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}
#elif defined(__AVX2__)
#define MLPKIT_EVEN_LANES {0, 2, 4, 6, 8, 10, 12, 14}
#else
#define MLPKIT_EVEN_LANES {0, 2, 4, 6}
#endif

// Vectors of calls that advance together, so that one's multiplications hide the latency of another's.
#if defined(__AVX512F__)
constexpr int kPhiloxVectors = 4;
#else
constexpr int kPhiloxVectors = 2;
#endif
constexpr int kPhiloxLanes = kLanes / 2;  // calls in a vector

MLPKIT_HD uint64_t multiply_low(uint64_t x, uint32_t by) { return (x & 0xffffffffu) * by; }

// What the 32 calls of a tile share. Their counters differ in one word, the lane, so for two rounds half of the words
// are the same for all, and in the third round one product still is. Every 64-bit lane carries one 32-bit word, whose
// upper half may hold anything, because the multiplication reads the lower half only.
class PhiloxTile {
 public:
  MLPKIT_HD PhiloxTile(const Dropout& dropout, uint64_t tile)
      : key0_(static_cast<uint32_t>(dropout.seed)), key1_(static_cast<uint32_t>(dropout.seed >> 32)) {
    const uint64_t first0 = multiply_low(tile, kPhiloxMultiplier0);
    const uint64_t first1 = multiply_low(uint64_t{dropout.offset}, kPhiloxMultiplier1);
    start_ = (first1 >> 32) ^ (tile >> 32 << 5) ^ key0_;
    first0_ = first0 ^ key1(1);
    second1_ = multiply_low((first0 >> 32) ^ dropout.stream ^ key1_, kPhiloxMultiplier1);
    third0_ = multiply_low((second1_ >> 32) ^ first1 ^ key0(1), kPhiloxMultiplier0);
  }

  // The four words of calls `lane`, in the lower halves.
  MLPKIT_HD void words(const LongVec (&lane)[kPhiloxVectors], LongVec (&c)[4][kPhiloxVectors]) const {
    for (int i = 0; i < kPhiloxVectors; ++i) {
      const LongVec second0 = multiply_low(lane[i] ^ start_, kPhiloxMultiplier0);
      const LongVec third1 = multiply_low((second0 >> 32) ^ first0_, kPhiloxMultiplier1);
      c[0][i] = (third1 >> 32) ^ (second1_ ^ key0(2));
      c[1][i] = third1;
      c[2][i] = second0 ^ ((third0_ >> 32) ^ key1(2));
      c[3][i] = LongVec{} + third0_;
    }
#pragma GCC unroll 10
    for (int round = 3; round < kPhiloxRounds; ++round)
      for (int i = 0; i < kPhiloxVectors; ++i) {
        const LongVec product0 = multiply_low(c[0][i], kPhiloxMultiplier0);
        const LongVec product1 = multiply_low(c[2][i], kPhiloxMultiplier1);
        c[0][i] = (product1 >> 32) ^ c[1][i] ^ key0(round);
        c[2][i] = (product0 >> 32) ^ c[3][i] ^ key1(round);
        c[1][i] = product1;
        c[3][i] = product0;
      }
  }

 private:
  MLPKIT_HD uint32_t key0(uint32_t round) const { return key0_ + round * kPhiloxWeyl0; }
  MLPKIT_HD uint32_t key1(uint32_t round) const { return key1_ + round * kPhiloxWeyl1; }

  uint32_t key0_, key1_;
  uint64_t start_, first0_, second1_, third0_;  // by the round they come from; start_ goes into the second
};

// The lower halves of a vector, or of two, side by side.
MLPKIT_HD void store_low_halves(uint32_t* to, LongVec lanes) {
  typedef uint32_t Narrow __attribute__((vector_size(kLanes * 2)));
  store_bits(to, __builtin_convertvector(lanes, Narrow));
}
MLPKIT_HD void store_low_halves(uint32_t* to, LongVec first, LongVec second) {
  constexpr UintVec even = MLPKIT_EVEN_LANES;
  store_bits(to, __builtin_shuffle((UintVec)first, (UintVec)second, even));
}

MLPKIT_END_ISA
