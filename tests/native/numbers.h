// Numbers of every storage type by plain arithmetic, apart from core/dtype.h, which is what the checks judge (tests).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace native {

using mlpkit::Dtype;
using Real = long double;

struct Precision {
  int digits, lowest;  // bits of the significand; exponent of the smallest subnormal
  Real largest;
};

inline Precision precision_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return {53, -1074, 0x1.fffffffffffffp1023L};
    case Dtype::bfloat16:
      return {8, -133, 0x1.fep127L};
    case Dtype::float16:
      return {11, -24, 65504.0L};
    default:
      return {24, -149, 0x1.fffffep127L};
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
inline Dtype compute_type(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

// The distance from x to the next number of that type, away from zero.
inline Real ulp(Real x, Dtype dtype) {
  const Precision p = precision_of(dtype);
  int exponent = p.lowest;
  if (x != 0) std::frexp(x, &exponent);
  return std::ldexp(1.0L, std::max(exponent - p.digits, p.lowest));
}

// Round to nearest, ties to even.
inline Real rounded(Real x, Dtype dtype) {
  if (x == 0 || !std::isfinite(x)) return x;
  const Real step = ulp(x, dtype), result = std::nearbyint(x / step) * step;
  return std::fabs(result) > precision_of(dtype).largest ? std::copysign(INFINITY, result) : result;
}

inline Real decode(uint16_t bits, Dtype dtype) {
  const int mantissa = precision_of(dtype).digits - 1, width = 15 - mantissa, bias = (1 << (width - 1)) - 1;
  const int field = bits >> mantissa & ((1 << width) - 1), fraction = bits & ((1 << mantissa) - 1);
  Real magnitude = std::ldexp(Real(fraction + (field ? 1 << mantissa : 0)), (field ? field : 1) - bias - mantissa);
  if (field == (1 << width) - 1) magnitude = fraction ? NAN : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The bits of a finite number that the type holds exactly.
inline uint16_t encode(Real x, Dtype dtype) {
  const int mantissa = precision_of(dtype).digits - 1, bias = (1 << (14 - mantissa)) - 1;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const Real magnitude = std::fabs(x);
  if (magnitude < std::ldexp(1.0L, 1 - bias))
    return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, bias - 1 + mantissa)));
  int exponent = 0;
  const Real part = std::frexp(magnitude, &exponent);
  const int fraction = static_cast<int>(std::ldexp(part, mantissa + 1)) - (1 << mantissa);
  return static_cast<uint16_t>(sign | (exponent - 1 + bias) << mantissa | fraction);
}

template <class T>
T load_as(const void* from, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(from) + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

inline Real get(Dtype dtype, const void* from, int64_t index) {
  if (dtype == Dtype::float64) return load_as<double>(from, index);
  if (dtype == Dtype::float32) return load_as<float>(from, index);
  return decode(load_as<uint16_t>(from, index), dtype);
}

}  // namespace native
