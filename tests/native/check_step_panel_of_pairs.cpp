// step_panel_of_pairs, for AVX-512 with bf16 alone (tests).
#include "step_norm_cases.h"

namespace {

using namespace native;

void step_panel_of_pairs(Report& report) {
  if (!has_pairs(report)) return;
#if defined(__x86_64__)
  Draw draw(54);
  check_steps(kPairs, mlpkit::isa_avx512_bf16::step_panel_of_pairs, draw, report);
  check_norms(kPairs, mlpkit::isa_avx512_bf16::step_panel_of_pairs, draw, report);
  check_ignored(kPairs, mlpkit::isa_avx512_bf16::step_panel_of_pairs, draw, report);
#endif
}

NATIVE_CHECK(step_panel_of_pairs, step_panel_of_pairs);

}  // namespace
