// step_panel with batch and layer norm, on float32 and on bfloat16 that lies rounded in float32; ignored rows (tests).
#include "step_norm_cases.h"

namespace {

using namespace native;

void step_panel_norms(Report& report) {
  Draw draw(61);
  for (const Format format : {kFloats, kRounded}) {
    check_norms(format, mlpkit::cpu::step_panel, draw, report);
    check_ignored(format, mlpkit::cpu::step_panel, draw, report);
  }
}

NATIVE_CHECK(step_panel_norms, step_panel_norms);

}  // namespace
