// scan against a look at one number after another (tests).
#include "cpu/scan.h"

#include "harness.h"

namespace {

using namespace native;
using mlpkit::ScanResult;

// Finite bits with many zeros and subnormals; NaN and Inf only where asked for.
void fill(Memory& memory, Dtype dtype, int64_t count, bool finite, Draw& draw) {
  const int width = 8 * static_cast<int>(size_of(dtype)), mantissa = precision_of(dtype).digits - 1;
  const uint64_t field = ((1ull << (width - 1 - mantissa)) - 1) << mantissa;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits = draw.bits();
    const int64_t kind = draw.below(8);
    if (kind == 0) bits &= 1ull << (width - 1);
    if (kind == 1) bits &= ~field;
    if (finite && (bits & field) == field) bits &= ~(1ull << mantissa);
    std::memcpy(memory.data() + i * size_of(dtype), &bits, static_cast<size_t>(size_of(dtype)));
  }
}

void scan(Report& report) {
  Draw draw(47);
  for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16})
    for (const int64_t count : {0, 1, 2, 7, 15, 17, 33, 65, 4095, 4096, 4097, 9000})
      for (const bool finite : {true, false}) {
        Memory memory(count * size_of(dtype), size_of(dtype), draw);
        fill(memory, dtype, count, finite, draw);
        ScanResult ours, exact{0, 0, 0, true};
        for (int64_t i = 0; i < count; ++i) {
          const Real x = get(dtype, memory.data(), i);
          exact.finite = exact.finite && std::isfinite(x);
          exact.zero += x == 0;
          const double size = std::fabs(static_cast<double>(x));
          if (!std::isfinite(x)) continue;
          exact.absmax = std::max(exact.absmax, size);
          exact.absmin = i == 0 ? size : std::min(exact.absmin, size);
        }
        mlpkit::cpu::scan({dtype, memory.data(), count, &ours});
        report.that("finite", count, ours.finite == exact.finite);
        report.that("zero", count, ours.zero == exact.zero);
        if (!exact.finite) continue;
        report.that("absmax", count, ours.absmax == exact.absmax);
        report.that("absmin", count, ours.absmin == exact.absmin);
      }
}

NATIVE_CHECK(scan, scan);

}  // namespace
