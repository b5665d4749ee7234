// Vectors of floats for the instruction set this file is compiled for, built on the compiler's own vector types, so
// that the formulas of core take them as they take a float (cpu). Included by *_kernel.cpp files only.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/macros.h"
#include "core/math.h"

MLPKIT_BEGIN_ISA

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float FloatVec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));
typedef uint64_t LongVec __attribute__((vector_size(kLanes * 4)));  // half as many lanes, twice as wide

namespace math {
template <>
struct IntOf<FloatVec> {
  using type = IntVec;
};

template <>
struct SquareRoot<FloatVec> {
  MLPKIT_HD static FloatVec of(FloatVec x) {
#if defined(__AVX512F__)
    return (FloatVec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (FloatVec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (FloatVec)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
};
}  // namespace math

// The widest value the epilogue computes with: a vector for float, one number for double.
template <class C>
struct Wide;
template <>
struct Wide<float> {
  using type = FloatVec;
  static constexpr int lanes = kLanes;
};
template <>
struct Wide<double> {
  using type = double;
  static constexpr int lanes = 1;
};

template <class V, class T>
MLPKIT_HD V load_bits(const T* from) {
  V to;
  __builtin_memcpy(&to, from, sizeof(V));
  return to;
}
template <class V, class T>
MLPKIT_HD void store_bits(T* to, V from) {
  __builtin_memcpy(to, &from, sizeof(V));
}

// The first n numbers of a vector's worth; the others are zero and their memory is not read.
template <class V, class T>
MLPKIT_HD V load_part(const T* from, int64_t n) {
  constexpr int64_t count = sizeof(V) / sizeof(T);
  if (n >= count) return load_bits<V>(from);
  T padded[count] = {};
  __builtin_memcpy(padded, from, n * sizeof(T));
  return load_bits<V>(padded);
}

// The inverse: writes the first n numbers.
template <class V, class T>
MLPKIT_HD void store_part(T* to, V from, int64_t n) {
  constexpr int64_t count = sizeof(V) / sizeof(T);
  if (n >= count) return store_bits(to, from);
  __builtin_memcpy(to, &from, n * sizeof(T));
}

MLPKIT_HD void load(const float* from, FloatVec& to) { to = load_bits<FloatVec>(from); }
MLPKIT_HD void load(const double* from, double& to) { to = *from; }
MLPKIT_HD void load(const BFloat16* from, FloatVec& to) {
  to = (FloatVec)(__builtin_convertvector(load_bits<ShortVec>(from), UintVec) << 16);
}
MLPKIT_HD void load(const Half* from, FloatVec& to) {
#if defined(__AVX512F__)
  to = (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  to = (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = to_float(from[i]);
#endif
}

MLPKIT_HD void store(float* to, FloatVec from) { store_bits(to, from); }
MLPKIT_HD void store(double* to, double from) { *to = from; }
MLPKIT_HD void store(BFloat16* to, FloatVec from) {
  const UintVec bits = (UintVec)from;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40;
  store_bits(to, __builtin_convertvector(from != from ? quiet : rounded, ShortVec));
}
MLPKIT_HD void store(Half* to, FloatVec from) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)from, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)from, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = to_half(from[i]);
#endif
}

// The sum of all lanes in double, by halves: in a chain every addition would wait for the one before.
template <int n>
MLPKIT_HD double sum_by_halves(const double (&v)[n]) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    double half[n / 2];
    for (int i = 0; i < n / 2; ++i) half[i] = v[i] + v[i + n / 2];
    return sum_by_halves(half);
  }
}
MLPKIT_HD double sum_of_lanes(FloatVec v) {
  double wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = v[i];
  return sum_by_halves(wide);
}

// One bit a lane: set where the lane of a comparison's result is true.
MLPKIT_HD unsigned lane_mask(IntVec condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)condition));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)condition));
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (condition[i] ? 1u : 0u) << i;
  return mask;
#endif
}
MLPKIT_HD unsigned lane_mask(bool condition) { return condition; }

// value where the lane's bit is set, otherwise where it is not.
MLPKIT_HD void select_lanes(unsigned mask, FloatVec value, FloatVec otherwise, FloatVec& to) {
#if defined(__AVX512F__)
  to = (FloatVec)_mm512_mask_mov_ps((__m512)otherwise, static_cast<__mmask16>(mask), (__m512)value);
#else
  IntVec bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  to = ((bit & static_cast<int>(mask)) != 0) ? value : otherwise;
#endif
}
MLPKIT_HD void select_lanes(unsigned mask, double value, double otherwise, double& to) {
  to = mask & 1 ? value : otherwise;
}

// The product of the low 32 bits of every 64-bit lane with a constant, whole.
MLPKIT_HD LongVec multiply_low(LongVec x, uint32_t by) {
#if defined(__AVX512F__)
  return (LongVec)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (LongVec)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (LongVec)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return (x & 0xffffffffu) * by;
#endif
}

MLPKIT_END_ISA
