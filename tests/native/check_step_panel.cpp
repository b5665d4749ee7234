// step_panel on float32 and on bfloat16 that lies rounded in float32 (tests).
#include "step_judge.h"

namespace {

using namespace native;

void step_panel(Report& report) {
  Draw draw(51);
  for (const Format format : {kFloats, kRounded}) check_steps(format, mlpkit::cpu::step_panel, draw, report);
}

NATIVE_CHECK(step_panel, step_panel);

}  // namespace
