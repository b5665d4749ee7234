// step_weights: bfloat16 that lies rounded in float32 (tests).
#include "step_rounding.h"

namespace {

using namespace native;

void step_weights(Report& report) {
  Draw draw(53);
  check_weights(kRounded, mlpkit::cpu::step_weights, draw, report);
}

NATIVE_CHECK(step_weights, step_weights);

}  // namespace
