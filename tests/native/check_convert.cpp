// convert: every 16-bit pattern to fp32, and fp32 to 16 bits as round to nearest even says (tests).
#include "cpu/linear_act_dropout.h"
#include "harness.h"

namespace {

using namespace native;

Real from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool same(Real a, Real b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

void widen(Dtype from, int64_t first, int64_t count, Draw& draw, Report& report) {
  Memory numbers(count * 2, 2, draw);
  Numbers wide(Dtype::float32, count, draw);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = static_cast<uint16_t>(first + i);
    std::memcpy(numbers.data() + 2 * i, &bits, 2);
  }
  mlpkit::cpu::convert({from, Dtype::float32, numbers.data(), wide.data(), count});
  for (int64_t i = 0; i < count; ++i)
    report.that("to float32", first + i, same(wide.get(i), decode(static_cast<uint16_t>(first + i), from)));
}

// Patterns near a tie as often as far from one, of every exponent.
uint32_t pattern(Draw& draw) {
  const uint32_t bits = static_cast<uint32_t>(draw.bits());
  const uint32_t low = draw.of<uint32_t>({0u, 0x7fffu, 0x8000u, 0x8001u, 0xfffu, 0x1000u, 0x1001u, bits & 0xffffu});
  // Half of them within float16's range, where its own rounding decides.
  const uint32_t exponent = draw.coin() ? bits >> 23 & 0xff : 100 + (bits >> 23) % 48;
  return (bits & 0x807f0000u) | exponent << 23 | low;
}

void narrow(Dtype to, int64_t count, Draw& draw, Report& report) {
  Memory wide(count * 4, 4, draw);
  Memory numbers(count * 2, 2, draw);
  std::vector<uint32_t> patterns;
  for (int64_t i = 0; i < count; ++i) {
    patterns.push_back(pattern(draw));
    std::memcpy(wide.data() + 4 * i, &patterns.back(), 4);
  }
  mlpkit::cpu::convert({Dtype::float32, to, wide.data(), numbers.data(), count});
  for (int64_t i = 0; i < count; ++i)
    report.that("from float32", patterns[static_cast<size_t>(i)],
                same(get(to, numbers.data(), i), rounded(from_bits(patterns[static_cast<size_t>(i)]), to)));
}

void convert(Report& report) {
  Draw draw(21);
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    widen(dtype, 0, 65536, draw, report);
    narrow(dtype, 100000, draw, report);
    for (int64_t count = 0; count < 40; ++count) {
      widen(dtype, 1000 * count, count, draw, report);
      narrow(dtype, count, draw, report);
    }
  }
}

NATIVE_CHECK(convert, convert);

}  // namespace
