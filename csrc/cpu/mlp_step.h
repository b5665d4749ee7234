// A training step of an MLP in two kinds of work, each independent of its neighbours (cpu): all layers forward, the
// loss and all layers backward for 32 rows of a batch; then the gradients of 32 columns of a layer's weight. Rows lie
// in the lanes of a vector, so neither narrow layers nor ten classes waste any.
//
// What is multiplied lies in 32-bit lanes: one float32, or two bfloat16 that are neighbours along the sum. lanes(n) is
// the number of lanes that n numbers take. bfloat16 and float16 in one lane each are float32 that were rounded.
#pragma once
#include <cstddef>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"
#include "core/loss.h"
#include "core/norm.h"
#include "cpu/capability.h"

namespace mlpkit {

constexpr int64_t kPanel = 32;
constexpr int64_t kMostLayers = 64;
inline int64_t panels_of(int64_t extent) { return (extent + kPanel - 1) / kPanel; }

struct StepNorm {  // between a hidden layer's product and its activation: u = x weight + bias,  x = (z - mean) inverse
  Norm kind;
  double eps;
  const float *weight, *bias;     // [out], or nullptr for 1 and 0
  double* moments;                // batch: [panels of rows, 2, out]: of a panel's rows; nullptr where mean is given
  const float *mean, *inverse;    // batch: [out]
  float* sums;                    // [panels of rows, 2, out]: of du and of du x over a panel's rows
  const float *mean_g, *mean_gx;  // batch: [out], of g = du weight over all rows; nullptr for 0
};

struct StepLayer {
  int64_t in, out;
  Activation activation;
  float negative_slope;
  Dropout dropout;
  const float* weight;    // [out, in]
  const float* forward;   // [out, lanes(in)]: the weight, as the forward pass multiplies with it
  const float* backward;  // [lanes(out), in]: the same for the backward pass
  const float* bias;      // [out] or nullptr
  const float* slope;     // [out] or [1]: prelu's, otherwise nullptr
  bool slope_by_column;
  StepNorm norm;
  float* dweight;  // [out, in]
  float* dbias;    // [out] or nullptr
  float* inputs;   // [panels of rows, panels of in, lanes(32 rows), 32 columns]: what came in; zeros where columns end,
                   // up to 16 n
  float* dz;       // [panels of rows, out, lanes(32 rows)]; zeros where the rows end
  float* dslope;   // [panels of rows, out]: the panel's sums, or nullptr
  // A first layer in float32 that reads its rows where they lie in x: weight and dweight are [in, across_of(out)] with
  // zeros where the outputs end, dz [panels of rows, 32, across_of(out)]; forward, backward and inputs are not used.
  bool in_place;
};

inline int64_t across_of(int64_t out) { return (out + 15) / 16 * 16; }
// Whether that is quicker: few outputs, nearly as many as lie across, of many columns.
inline bool pays_in_place(int64_t in, int64_t out) {
  return across_of(out) <= 32 && 4 * out >= 3 * across_of(out) && in >= 2 * across_of(out);
}

constexpr int32_t kIgnored = -1, kNoRow = -2;

struct StepLoss {
  Loss kind;
  float scale;                    // of the slopes: 1 / rows, say
  float delta;                    // huber's
  Smoothing smoothing;            // cross_entropy's, as are the next three
  const int32_t* classes;         // [panels of rows, 32]: kIgnored where a row does not count, kNoRow beyond the rows
  const float* weights;           // [panels of rows, 32]: of each row, 0 where it does not count
  const float* by_class;          // [classes] or nullptr, where all weigh 1
  const float* target;            // [rows, out]: of the other losses
  const float* by_row = nullptr;  // [panels of rows, 32]: what each row's share is multiplied by, or nullptr for 1
};

struct StepWeights {  // fills what `forward` and `backward` of a layer point to, where that is not the weight itself
  Dtype dtype;
  int64_t in, out;
  const float* weight;
  float *forward, *backward;  // one and the same where a lane holds one number
};

struct StepPanel {
  Dtype dtype;  // float32, bfloat16 or float16
  const StepLayer* layers;
  int64_t count, rows, panel;  // at most kMostLayers
  const float* x;              // [rows, in]
  StepLoss loss;
  int64_t from, until;             // segments; until 0 means all that are left
  float* scratch;                  // step_scratch floats, 64-byte aligned; between segments of a panel it must stay
  double* value;                   // the panel's share of the loss, before scale
  const int32_t* index = nullptr;  // [rows]: which rows of x they are, or nullptr: the first ones
  float* outputs = nullptr;        // [rows, out]: what the last layer puts out, or nullptr where nobody asks
};

struct StepGradient {
  const StepLayer* layer;
  int64_t rows, panel;       // of the layer's columns; the first one has the bias gradient with it
  double* squares;           // the sum of squares of what is written
  const float* x = nullptr;  // [.., in] and which of them are the batch's, or nullptr: of a layer in place, whose only
  const int32_t* index = nullptr;  // panel has all columns
};

// A panel's pass has two segments for each layer: layer i's product is in segment i, and its gradients are in segment
// 2 layers - 1 - i. A batch norm of layer i must know all rows of the product before segment i + 1, and all of du
// before the layer's gradients.
//
// What a layer keeps for its backward pass: its outputs where they tell the slopes, otherwise the slopes too, and what
// prelu's parameter is multiplied by.
inline int64_t step_kept(const StepLayer& layer) {
  const bool linear = layer.activation == Activation::identity && layer.dropout.threshold == 0;
  if (linear || layer.activation == Activation::relu) return 1;
  return layer.activation == Activation::prelu ? 3 : 2;
}
// Floats that step_panel works in: targets and what is kept, for a norm x and the rows' inverse too; one layer as it is
// multiplied, forward and backward, and its gradients before they are rounded; the mask of one layer.
inline int64_t step_scratch(const StepLayer* layers, int64_t count) {
  int64_t columns = layers[count - 1].out, widest = layers[0].in;
  for (int64_t i = 0; i < count; ++i) {
    columns += step_kept(layers[i]) * layers[i].out;
    if (layers[i].norm.kind != Norm::none) columns += layers[i].out + 1;
    widest = widest > layers[i].out ? widest : layers[i].out;
  }
  return (columns + 3 * widest) * kPanel + (widest + kMaskTile - 1) / kMaskTile * kMaskTile;
}

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(step_weights, StepWeights)
MLPKIT_CPU_KERNEL(step_panel, StepPanel)
MLPKIT_CPU_KERNEL(step_gradient, StepGradient)

namespace mlpkit::isa_avx512_bf16 {
// The same for bfloat16 in pairs; for Capability::avx512_bf16 alone.
void step_weights_of_pairs(const StepWeights&);
void step_panel_of_pairs(const StepPanel&);
void step_gradient_of_pairs(const StepGradient&);
}  // namespace mlpkit::isa_avx512_bf16
