// What a floating-point element is, from its bit pattern alone: one comparison of integers each (core; host and
// device). The magnitude of a pattern (sign bit cleared) grows with the number's absolute value, so that
//   0 = zero < subnormal < smallest normal <= normal < infinity < NaN.
#pragma once
#include "core/dtype.h"

namespace mlpkit {

constexpr int kHistogramBins = 64;
constexpr int kHistogramLowest = -40;  // bin 0 holds this exponent and below, bin 63 holds 23 and above

// One row of counts; `first` is the flat index of the first NaN or Inf, or -1.
struct CensusCounts {
  int64_t nan, posinf, neginf, zero, subnormal, above_fp16_max, below_fp16_min, first;
};

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

// fp16_max: the largest magnitude that is at most 65504; fp16_min: the magnitude of 2^-14, float16's smallest normal.
template <class B, int mantissa_, B fp16_max_, B fp16_min_>
struct Format {
  using Bits = B;
  static constexpr int mantissa = mantissa_, width = 8 * sizeof(B);
  static constexpr B sign = static_cast<B>(B{1} << (width - 1)), magnitude = static_cast<B>(sign - 1);
  static constexpr B infinity = static_cast<B>(magnitude >> mantissa << mantissa);
  static constexpr B smallest_normal = static_cast<B>(B{1} << mantissa);
  static constexpr B fp16_max = fp16_max_, fp16_min = fp16_min_;
  static constexpr int bias = static_cast<int>(infinity >> mantissa) / 2;
};
using Float64Format = Format<uint64_t, 52, 0x40effc0000000000u, 0x3f10000000000000u>;
using Float32Format = Format<uint32_t, 23, 0x477fe000u, 0x38800000u>;
using BFloat16Format = Format<uint16_t, 7, 0x477f, 0x3880>;
using Float16Format = Format<uint16_t, 10, 0x7bff, 0x0400>;

// floor(log2 |x|) of a finite non-zero magnitude; a subnormal's comes from its highest bit.
template <class F>
MLPKIT_HD int exponent_of(typename F::Bits magnitude) {
  const int field = static_cast<int>(magnitude >> F::mantissa);
  if (field) return field - F::bias;
  int highest = 0;
  for (typename F::Bits rest = magnitude; rest >>= 1;) ++highest;
  return highest + 1 - F::bias - F::mantissa;
}

MLPKIT_HD int histogram_bin(int exponent) {
  const int bin = exponent - kHistogramLowest;
  return bin < 0 ? 0 : bin >= kHistogramBins ? kHistogramBins - 1 : bin;
}

// The non-negative number with this magnitude, exactly.
template <class F>
MLPKIT_HD double value_of(typename F::Bits magnitude) {
  if constexpr (F::width == 64) {
    return math::bits_as<double>(magnitude);
  } else if constexpr (F::width == 32) {
    return math::bits_as<float>(magnitude);
  } else if constexpr (F::mantissa == 7) {
    return to_float(BFloat16{magnitude});
  } else {
    return to_float(Half{magnitude});
  }
}

MLPKIT_END_ISA
