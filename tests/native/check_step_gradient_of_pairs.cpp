// step_gradient_of_pairs, for AVX-512 with bf16 alone (tests).
#include "step_sums.h"

namespace {

using namespace native;

void step_gradient_of_pairs(Report& report) {
  if (!has_pairs(report)) return;
#if defined(__x86_64__)
  Draw draw(55);
  check_gradients(kPairs, mlpkit::isa_avx512_bf16::step_gradient_of_pairs, draw, report);
#endif
}

NATIVE_CHECK(step_gradient_of_pairs, step_gradient_of_pairs);

}  // namespace
