// step_weights_of_pairs, for AVX-512 with bf16 alone (tests).
#include "step_rounding.h"

namespace {

using namespace native;

void step_weights_of_pairs(Report& report) {
  if (!has_pairs(report)) return;
#if defined(__x86_64__)
  Draw draw(56);
  check_weights(kPairs, mlpkit::isa_avx512_bf16::step_weights_of_pairs, draw, report);
#endif
}

NATIVE_CHECK(step_weights_of_pairs, step_weights_of_pairs);

}  // namespace
