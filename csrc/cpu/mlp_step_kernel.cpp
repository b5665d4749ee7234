// A training step of an MLP with one number in a lane: float32, or bfloat16 and float16 as rounded float32 (cpu;
// compiled once for each instruction set).
#include "cpu/mlp_step.h"

#include "cpu/mlp_gradient.h"
#include "cpu/mlp_pass.h"

MLPKIT_BEGIN_ISA
namespace {

template <class T>
MLPKIT_HD FloatVec rounded_to(FloatVec v) {
  if constexpr (!__is_same(T, float)) {
    T rounded[kLanes];
    store(rounded, v);
    load(rounded, v);
  }
  return v;
}

template <class T>
void round_all(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, rounded_to<T>(load_bits<FloatVec>(from + i)));
  if (i < count) store_part(to + i, rounded_to<T>(load_part<FloatVec>(from + i, count - i)), count - i);
}

template <class T>
struct Rounded {
  using Lane = OneInALane;

  // First a plain copy, which the hardware sees coming; the transposition then reads what is in L1.
  static void rows(const TableRows& x, int64_t cols, float* in, float* blocks) {
    blocks_of_rows(x, cols, blocks);
    if (!__is_same(T, float)) round_all<T>(blocks, panels_of(cols) * kPanel * kPanel, blocks);
    for (int64_t col = 0; col < cols; col += kPanel)
      panel_of_rows(TableRows(blocks + col * kPanel, kPanel, nullptr, 0, kPanel), smaller(kPanel, cols - col),
                    in + col * kPanel);
  }
  static const float* outputs(float* y, int64_t cols, float*, float* blocks) {
    if (!__is_same(T, float)) round_all<T>(y, cols * kPanel, y);
    blocks_of_panel(y, cols, blocks);
    return y;
  }
  static const float* gradients(const float* dz, int64_t cols, float* natural, float*) {
    round_all<T>(dz, cols * kPanel, natural);
    return natural;
  }
};

}  // namespace

void step_weights(const StepWeights& w) {
  if (w.dtype == Dtype::float16) return round_all<Half>(w.weight, w.in * w.out, w.forward);
  round_all<BFloat16>(w.weight, w.in * w.out, w.forward);
}

void step_panel(const StepPanel& step) {
  if (step.dtype == Dtype::bfloat16) return Pass<Rounded<BFloat16>>(step).run();
  if (step.dtype == Dtype::float16) return Pass<Rounded<Half>>(step).run();
  Pass<Rounded<float>>(step).run();
}

void step_gradient(const StepGradient& g) { gradient_pass<OneInALane>(g); }

MLPKIT_END_ISA
