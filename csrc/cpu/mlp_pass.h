// All layers of an MLP forward, the loss and all layers backward for one panel of rows, in any format of what is
// multiplied (cpu). Included by the mlp_step kernels only.
//
// A Format has Lane, and says how numbers in fp32 become what is multiplied:
//   rows(x, stride, rows, cols, in, blocks)   a panel of x -> in: [lanes(cols), 32], blocks as StepLayer::inputs
//   outputs(y, cols, in, blocks)              the same of a panel y of outputs; returns where the former lies
//   gradients(dz, cols, natural, across)      dz: [cols, 32] -> as StepLayer::dz, and [lanes(cols), 32]: where it lies
#pragma once
#include "cpu/mask_columns.h"
#include "cpu/mlp_loss.h"
#include "cpu/mlp_step.h"
#include "cpu/panel.h"

MLPKIT_BEGIN_ISA

struct Kept {                 // of one layer and panel, [out, 32] each
  float *y, *slopes, *below;  // outputs; slopes with mask and scale; prelu's outputs by its parameter
};

template <class Format, class A>
void layer_forward(const StepLayer& layer, int64_t panel, const float* in, const Kept& kept, uint32_t* keep) {
  const uint32_t threshold = layer.dropout.threshold;
  const bool draws = threshold > 0 && threshold < 65536;
  const float scale = static_cast<float>(layer.dropout.scale);
  if (draws) mask_of_panel(layer.dropout, panel, layer.out, keep);
  const auto finish = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    for (int64_t n = first; n < first + count; ++n) {
      const float bias = layer.bias ? layer.bias[n] : 0.f;
      const FloatVec a = FloatVec{} + (layer.slope ? layer.slope[layer.slope_by_column ? n : 0] : layer.negative_slope);
      const uint32_t bits = draws ? keep[n] : 0u;
      for (int64_t col = 0; col < kPanel; col += kLanes) {
        const int64_t at = n * kPanel + col;
        const FloatVec z = load_bits<FloatVec>(kept.y + at) + bias;
        FloatVec y = A::value(z, a), by_mask = FloatVec{} + 1.f;
        if (threshold) {
          select_lanes(bits >> col, FloatVec{} + scale, FloatVec{}, by_mask);
          y = y * by_mask;
        }
        store(kept.y + at, y);
        if (kept.slopes) store(kept.slopes + at, A::slope(z, a) * by_mask);
        if constexpr (__is_same(A, Prelu)) store(kept.below + at, Prelu::slope_by_a(z) * by_mask);
      }
    }
  };
  const int64_t depth = lanes_of<typename Format::Lane>(layer.in);
  panel_product<typename Format::Lane>({layer.forward, depth, 1}, in, depth, layer.out, kept.y, finish);
}

// dz of a layer in fp32, [out, 32], out of that of the layer above, [lanes(out), 32].
template <class Format>
void layer_backward(const StepLayer& above, const float* dz_above, const StepLayer& layer, int64_t panel,
                    const Kept& kept, float* dz) {
  const FloatVec scale = FloatVec{} + static_cast<float>(layer.dropout.scale);
  const auto finish = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    for (int64_t n = first; n < first + count; ++n) {
      FloatVec dslope{};
      for (int64_t at = n * kPanel; at < (n + 1) * kPanel; at += kLanes) {
        const FloatVec dy = load_bits<FloatVec>(dz + at), kept_y = load_bits<FloatVec>(kept.y + at);
        FloatVec slope = FloatVec{} + 1.f;
        if (kept.slopes)
          slope = load_bits<FloatVec>(kept.slopes + at);
        else if (layer.activation == Activation::relu)
          slope = kept_y <= 0.f ? FloatVec{} : scale;  // a NaN stays one
        if (kept.below) dslope += dy * load_bits<FloatVec>(kept.below + at);
        store(dz + at, dy * slope);
      }
      if (layer.dslope) layer.dslope[panel * layer.out + n] = static_cast<float>(sum_of_lanes(dslope));
    }
  };
  const int64_t depth = lanes_of<typename Format::Lane>(above.out);
  panel_product<typename Format::Lane>({above.backward, 1, above.in}, dz_above, depth, above.in, dz, finish);
}

// Memory of one panel's pass, taken piece by piece from the scratch.
class Scratch {
 public:
  explicit Scratch(float* memory) : free_(memory) {}
  float* columns(int64_t count) {
    float* taken = free_;
    free_ += count * kPanel;
    return taken;
  }
  uint32_t* rest() { return reinterpret_cast<uint32_t*>(free_); }

 private:
  float* free_;
};

template <class Format>
void panel_pass(const StepPanel& step) {
  constexpr int64_t block = kPanel * kPanel / Format::Lane::per_lane, column = kPanel / Format::Lane::per_lane;
  const StepLayer *layers = step.layers, *last = step.layers + step.count - 1;
  const int64_t panel = step.panel, first_row = panel * kPanel, rows = smaller(kPanel, step.rows - first_row);
  int64_t widest = layers->in;
  for (int64_t i = 0; i < step.count; ++i) widest = layers[i].out > widest ? layers[i].out : widest;
  Scratch scratch(step.scratch);
  Kept kept[kMostLayers];
  for (int64_t i = 0; i < step.count; ++i) {
    const int64_t out = layers[i].out, tensors = step_kept(layers[i]);
    kept[i] = {scratch.columns(out), tensors > 1 ? scratch.columns(out) : nullptr,
               tensors > 2 ? scratch.columns(out) : nullptr};
  }
  float *target = scratch.columns(last->out), *dz = scratch.columns(widest), *across = scratch.columns(widest);
  float* multiplied = scratch.columns(widest);
  uint32_t* keep = scratch.rest();

  const auto blocks = [&](const StepLayer& layer) { return layer.inputs + panel * panels_of(layer.in) * block; };
  Format::rows(step.x + first_row * layers->in, layers->in, rows, layers->in, multiplied, blocks(*layers));
  const float* in = multiplied;
  for (int64_t i = 0; i < step.count; ++i) {
    const StepLayer& layer = layers[i];
    if (i > 0) in = Format::outputs(kept[i - 1].y, layer.in, multiplied, blocks(layer));
    visit_activation(layer.activation, [&]<class A>(A) { layer_forward<Format, A>(layer, panel, in, kept[i], keep); });
  }

  if (step.loss.target) panel_of_rows(step.loss.target + first_row * last->out, last->out, rows, last->out, target);
  *step.value = loss_of_panel(step, last->out, kept[step.count - 1].y, target, dz);
  for (int64_t i = step.count - 1; i >= 0; --i) {
    const StepLayer& layer = layers[i];
    const float* multiplied_dz = Format::gradients(dz, layer.out, layer.dz + panel * layer.out * column, across);
    if (i > 0) layer_backward<Format>(layer, multiplied_dz, layers[i - 1], panel, kept[i - 1], dz);
  }
}

MLPKIT_END_ISA
