// The conversions of core/dtype.h, which the emulator uses, beside the toolkit's own on the host: prints how many
// differ (emulation).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <random>

#include "core/dtype.h"

using namespace mlpkit;

namespace {

template <class F>
bool same(F a, F b, bool nan_a, bool nan_b) {
  return nan_a || nan_b ? nan_a && nan_b : math::bits_as<uint32_t>(a) == math::bits_as<uint32_t>(b);
}
bool same(float a, float b) { return same(a, b, a != a, b != b); }

// Patterns near a tie as often as far from one; half of them in float16's range.
uint32_t pattern(std::mt19937& source, int i) {
  uint32_t bits = source();
  if (i % 2) bits = (bits & 0x8fffffffu) | 0x30000000u;
  if (i % 3 == 0) bits &= 0xfffff000u;
  if (i % 5 == 0) bits = (bits & 0xffff0000u) | 0x8000u;
  return bits;
}

}  // namespace

int main() {
  long wrong = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    wrong += !same(to_float(Half{bits}), __half2float(__half(__half_raw{bits})));
    wrong += !same(to_float(BFloat16{bits}), __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits})));
  }
  std::mt19937 source(1);
  for (int i = 0; i < 2000000; ++i) {
    const float number = math::bits_as<float>(pattern(source, i));
    const Half half{static_cast<__half_raw>(__float2half_rn(number)).x};
    const BFloat16 bfloat{static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(number)).x};
    wrong += !same(to_float(to_half(number)), to_float(half));
    wrong += !same(to_float(to_bfloat16(number)), to_float(bfloat));
  }
  std::printf("%ld\n", wrong);
  return wrong != 0;
}
