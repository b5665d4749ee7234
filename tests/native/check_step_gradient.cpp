// step_gradient on what lies in lanes of one number (tests).
#include "step_sums.h"

namespace {

using namespace native;

void step_gradient(Report& report) {
  Draw draw(52);
  check_gradients(kFloats, mlpkit::cpu::step_gradient, draw, report);
}

NATIVE_CHECK(step_gradient, step_gradient);

}  // namespace
