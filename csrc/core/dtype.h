// bfloat16 and float16 as bit patterns, and their exact conversions from and to float, round to nearest even (core;
// host).
#pragma once
#include "core/macros.h"
#include "core/math.h"

namespace mlpkit {

enum class Dtype : int { float64, float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace mlpkit

MLPKIT_BEGIN_ISA

MLPKIT_HD float to_float(BFloat16 x) { return math::bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
MLPKIT_HD BFloat16 to_bfloat16(float x) {
  const uint32_t bits = math::bits_as<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

MLPKIT_HD float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return math::bits_as<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400)
    return math::bits_as<float>(sign | math::bits_as<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  return math::bits_as<float>(sign | ((magnitude << 13) + (112u << 23)));
}
MLPKIT_HD Half to_half(float x) {
  const uint32_t bits = math::bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude <
      0x38800000) {  // below half's smallest normal: adding 0.5 makes float's own rounding cut at the right bit
    const float shifted = math::bits_as<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (math::bits_as<uint32_t>(shifted) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

MLPKIT_END_ISA
