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
  MLPKIT_HD PhiloxTile() = default;
  MLPKIT_HD explicit PhiloxTile(const Dropout& dropout) : offset_(dropout.offset), stream_(dropout.stream) {
    uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys_[0][round] = key0;
      keys_[1][round] = key1;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
  }

  MLPKIT_HD void move_to(uint64_t tile) {
    const uint64_t first0 = multiply_low(tile, kPhiloxMultiplier0), first1 = multiply_low(offset_, kPhiloxMultiplier1);
    const uint64_t second1 = multiply_low((first0 >> 32) ^ stream_ ^ keys_[1][0], kPhiloxMultiplier1);
    start_ = (first1 >> 32) ^ (tile >> 32 << 5) ^ keys_[0][0];
    second_ = first0 ^ keys_[1][1];
    third_[3] = multiply_low((second1 >> 32) ^ first1 ^ keys_[0][1], kPhiloxMultiplier0);
    third_[0] = second1 ^ keys_[0][2];
    third_[2] = (third_[3] >> 32) ^ keys_[1][2];
  }

  // The four words of calls `lane`, in the lower halves: as they are before the round kFirst, ...
  static constexpr int kFirst = 3;
  MLPKIT_HD void begin(LongVec lane, LongVec (&c)[4]) const {
    const LongVec second0 = multiply_low(lane ^ start_, kPhiloxMultiplier0);
    const LongVec third1 = multiply_low((second0 >> 32) ^ second_, kPhiloxMultiplier1);
    c[0] = (third1 >> 32) ^ third_[0];
    c[1] = third1;
    c[2] = second0 ^ third_[2];
    c[3] = LongVec{} + third_[3];
  }
  // ... by one round, ...
  MLPKIT_HD void round(int round, LongVec (&c)[4]) const {
    const LongVec product0 = multiply_low(c[0], kPhiloxMultiplier0), product1 = multiply_low(c[2], kPhiloxMultiplier1);
    c[0] = (product1 >> 32) ^ c[1] ^ keys_[0][round];
    c[2] = (product0 >> 32) ^ c[3] ^ keys_[1][round];
    c[1] = product1;
    c[3] = product0;
  }
  // ... and after all, for several vectors that advance together.
  template <int vectors>
  MLPKIT_HD void words(const LongVec (&lane)[vectors], LongVec (&c)[vectors][4]) const {
    for (int i = 0; i < vectors; ++i) begin(lane[i], c[i]);
#pragma GCC unroll 10
    for (int r = kFirst; r < kPhiloxRounds; ++r)
      for (int i = 0; i < vectors; ++i) round(r, c[i]);
  }

 private:
  // Of 64 bits each, as vectors take them from memory: a scalar's way into a vector costs more.
  uint64_t keys_[2][kPhiloxRounds];
  uint64_t offset_, stream_;
  uint64_t start_, second_, third_[4];  // what all calls of the tile share in the first three rounds
};

// The lower halves of two vectors side by side.
MLPKIT_HD UintVec low_halves(LongVec first, LongVec second) {
  constexpr UintVec even = MLPKIT_EVEN_LANES;
  return __builtin_shuffle((UintVec)first, (UintVec)second, even);
}

MLPKIT_END_ISA
