// All layers of an MLP forward, the loss and all layers backward for one panel of rows, in any format of what is
// multiplied (cpu). Included by the mlp_step kernels only.
//
// A Format has Lane, and says how numbers in fp32 become what is multiplied:
//   rows(x, cols, in, blocks)                 rows of x -> in: [lanes(cols), 32], blocks as StepLayer::inputs
//   outputs(y, cols, in, blocks)              the same of a panel y of outputs; returns where the former lies
//   gradients(dz, cols, natural, across)      dz: [cols, 32] -> as StepLayer::dz, and [lanes(cols), 32]: where it lies
#pragma once
#include "cpu/mask_columns.h"
#include "cpu/mlp_in_place.h"
#include "cpu/mlp_loss.h"
#include "cpu/mlp_norm.h"
#include "cpu/mlp_step.h"
#include "cpu/panel.h"

MLPKIT_BEGIN_ISA

// Outputs first to first + count of a panel: act(z + bias) with the mask, where kept.y holds z.
template <class A>
void activate(const StepLayer& layer, const Kept& kept, const uint32_t* keep, const float* biases, int64_t first,
              int64_t count) {
  const uint32_t threshold = layer.dropout.threshold;
  const bool draws = threshold > 0 && threshold < 65536;
  const float scale = static_cast<float>(layer.dropout.scale);
  for (int64_t n = first; n < first + count; ++n) {
    const float bias = biases ? biases[n] : 0.f;
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
}

// Gradients by what the activation was applied to: dy of outputs first to first + count becomes du.
inline void deactivate(const StepLayer& layer, int64_t panel, const Kept& kept, float* dy, int64_t first,
                       int64_t count) {
  const FloatVec scale = FloatVec{} + static_cast<float>(layer.dropout.scale);
  if (!kept.slopes && !kept.x) {
    if (layer.activation != Activation::relu) return;
    for (int64_t at = first * kPanel; at < (first + count) * kPanel; at += kLanes) {
      const FloatVec slope = load_bits<FloatVec>(kept.y + at) <= 0.f ? FloatVec{} : scale;  // a NaN stays one
      store(dy + at, load_bits<FloatVec>(dy + at) * slope);
    }
    return;
  }
  for (int64_t n = first; n < first + count; ++n) {
    FloatVec dslope{}, sum{}, sum_x{};
    for (int64_t at = n * kPanel; at < (n + 1) * kPanel; at += kLanes) {
      const FloatVec d = load_bits<FloatVec>(dy + at), y = load_bits<FloatVec>(kept.y + at);
      FloatVec slope = FloatVec{} + 1.f;
      if (kept.slopes)
        slope = load_bits<FloatVec>(kept.slopes + at);
      else if (layer.activation == Activation::relu)
        slope = y <= 0.f ? FloatVec{} : scale;  // a NaN stays one
      if (kept.below) dslope += d * load_bits<FloatVec>(kept.below + at);
      const FloatVec du = d * slope;
      if (kept.x) {
        sum += du;
        sum_x += du * load_bits<FloatVec>(kept.x + at);
      }
      store(dy + at, du);
    }
    if (layer.dslope) layer.dslope[panel * layer.out + n] = static_cast<float>(sum_of_lanes(dslope));
    if (!kept.x) continue;
    layer.norm.sums[2 * panel * layer.out + n] = static_cast<float>(sum_of_lanes(sum));
    layer.norm.sums[(2 * panel + 1) * layer.out + n] = static_cast<float>(sum_of_lanes(sum_x));
  }
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
class Pass {
 public:
  explicit Pass(const StepPanel& step)
      : step_(step),
        panel_(step.panel),
        first_row_(step.panel * kPanel),
        rows_(smaller(kPanel, step.rows - step.panel * kPanel)) {
    Scratch scratch(step.scratch);
    int64_t widest = step.layers->in;
    for (int64_t i = 0; i < step.count; ++i) {
      const StepLayer& layer = step.layers[i];
      const int64_t tensors = step_kept(layer);
      const bool normed = layer.norm.kind != Norm::none;
      const auto columns = [&](bool wanted, int64_t count) { return wanted ? scratch.columns(count) : nullptr; };
      kept_[i] = {scratch.columns(layer.out), columns(tensors > 1, layer.out), columns(tensors > 2, layer.out),
                  columns(normed, layer.out), columns(normed, 1)};
      widest = layer.out > widest ? layer.out : widest;
    }
    target_ = scratch.columns(step.layers[step.count - 1].out);
    dz_ = scratch.columns(widest);
    across_ = scratch.columns(widest);
    multiplied_ = scratch.columns(widest);
    keep_ = scratch.rest();
  }

  void run() {
    const int64_t until = step_.until ? step_.until : 2 * step_.count;
    for (int64_t segment = step_.from; segment < until; ++segment) {
      if (segment < step_.count)
        forward(segment);
      else
        backward(2 * step_.count - 1 - segment);
      if (segment == step_.count - 1) loss();
    }
  }

 private:
  static constexpr int64_t kColumn = kPanel / Format::Lane::per_lane;

  void forward(int64_t i) {
    const StepLayer& layer = step_.layers[i];
    if (layer.in_place) return forward_in_place(layer);
    const float* in = inputs(i);
    const int64_t depth = lanes_of<typename Format::Lane>(layer.in);
    const Strided weight{layer.forward, depth, 1};
    if (layer.norm.kind != Norm::none) {
      panel_product<typename Format::Lane>(
          weight, in, depth, layer.out, kept_[i].y, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
            if (layer.bias) activate<Identity>(plain(layer), {kept_[i].y}, nullptr, layer.bias, first, count);
          });
      if (layer.norm.moments) moments_of_panel(layer, panel_, rows_, kept_[i].y);
      return;
    }
    draw(layer);
    visit_activation(layer.activation, [&]<class A>(A) {
      panel_product<typename Format::Lane>(weight, in, depth, layer.out, kept_[i].y,
                                           [&](int64_t first, int64_t count) __attribute__((always_inline)) {
                                             activate<A>(layer, kept_[i], keep_, layer.bias, first, count);
                                           });
    });
  }

  void forward_in_place(const StepLayer& layer) {
    product_in_place(layer, TableRows(step_.x, layer.in, step_.index, first_row_, rows_), multiplied_, kept_[0].y);
    if (layer.norm.kind != Norm::none) {
      if (layer.bias) activate<Identity>(plain(layer), {kept_[0].y}, nullptr, layer.bias, 0, layer.out);
      if (layer.norm.moments) moments_of_panel(layer, panel_, rows_, kept_[0].y);
      return;
    }
    draw(layer);
    visit_activation(layer.activation,
                     [&]<class A>(A) { activate<A>(layer, kept_[0], keep_, layer.bias, 0, layer.out); });
  }

  // What layer i multiplies with its weight.
  const float* inputs(int64_t i) {
    const StepLayer& layer = step_.layers[i];
    float* blocks = layer.inputs + panel_ * panels_of(layer.in) * kPanel * kColumn;
    if (i == 0) {
      Format::rows(TableRows(step_.x, layer.in, step_.index, first_row_, rows_), layer.in, multiplied_, blocks);
      return multiplied_;
    }
    const StepLayer& below = step_.layers[i - 1];
    if (below.norm.kind != Norm::none) {
      normalise(below, kept_[i - 1]);
      draw(below);
      visit_activation(below.activation,
                       [&]<class A>(A) { activate<A>(below, kept_[i - 1], keep_, nullptr, 0, below.out); });
    }
    return Format::outputs(kept_[i - 1].y, layer.in, multiplied_, blocks);
  }

  static StepLayer plain(StepLayer layer) {
    layer.dropout = {};
    return layer;
  }

  void draw(const StepLayer& layer) {
    const uint32_t threshold = layer.dropout.threshold;
    if (threshold > 0 && threshold < 65536) mask_of_panel(layer.dropout, panel_, layer.out, keep_);
  }

  void loss() {
    const int64_t outputs = step_.layers[step_.count - 1].out;
    const float* y = kept_[step_.count - 1].y;
    if (step_.loss.target)
      panel_of_rows(TableRows(step_.loss.target, outputs, nullptr, first_row_, rows_), outputs, target_);
    *step_.value = loss_of_panel(step_, outputs, y, target_, dz_);
    if (step_.outputs) rows_of_panel(y, rows_, outputs, step_.outputs + first_row_ * outputs);
  }

  void backward(int64_t i) {
    const StepLayer& layer = step_.layers[i];
    if (layer.norm.kind != Norm::none) gradients_of_norm(layer, rows_, kept_[i], dz_);
    if (layer.in_place) return rows_across(dz_, layer.out, layer.dz + panel_ * kPanel * across_of(layer.out));
    const float* dz = Format::gradients(dz_, layer.out, layer.dz + panel_ * layer.out * kColumn, across_);
    if (i == 0) return;
    const StepLayer& below = step_.layers[i - 1];
    const int64_t depth = lanes_of<typename Format::Lane>(layer.out);
    panel_product<typename Format::Lane>({layer.backward, 1, layer.in}, dz, depth, layer.in, dz_,
                                         [&](int64_t first, int64_t count) __attribute__((always_inline)) {
                                           deactivate(below, panel_, kept_[i - 1], dz_, first, count);
                                         });
  }

  const StepPanel& step_;
  int64_t panel_, first_row_, rows_;
  Kept kept_[kMostLayers];
  float *target_, *dz_, *across_, *multiplied_;  // multiplied: inputs; across: gradients
  uint32_t* keep_;
};

MLPKIT_END_ISA
