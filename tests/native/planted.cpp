// Faults that the sanitizers and the comparison must see, or a clean run of the checks would say nothing (tests).
#include "harness.h"

namespace {

using namespace native;

void planted_overread(Report& report) {
  Draw draw(1);
  for (int i = 0; i < 8; ++i) {
    Numbers x(Dtype::float32, 5, draw);
    const volatile float* beyond = static_cast<const float*>(x.data());
    report.that("one element beyond the end", i, beyond[5] == beyond[5]);
  }
}

void planted_overflow(Report& report) {
  volatile int large = 2147483647;
  const volatile int sum = large + 1;
  report.that("a signed integer overflows", 0, sum < 0);
}

void planted_error(Report& report) { report.near("2 + 2", 0, 5, 4, 8 * unit(Dtype::float32)); }

NATIVE_CHECK(planted_overread, planted_overread);
NATIVE_CHECK(planted_overflow, planted_overflow);
NATIVE_CHECK(planted_error, planted_error);

}  // namespace
