// step_weights: bfloat16 and float16 that lie rounded in float32 (tests).
#include "step_rounding.h"

namespace {

using namespace native;

void step_weights(Report& report) {
  Draw draw(53);
  for (const Format format : {kRounded, kHalves}) check_weights(format, mlpkit::cpu::step_weights, draw, report);
}

NATIVE_CHECK(step_weights, step_weights);

}  // namespace
