// The passes of norm_act_dropout on the CPU over a region of the (rows, cols) input (cpu). C is the compute type:
// double where T is double, float otherwise. A region starts at a multiple of 16 in both directions; for layer norm it
// holds whole rows. u = x weight + bias,  x = (z - mean) inverse,  y = act(u) * mask * scale.
#pragma once
#include "core/norm.h"
#include "cpu/linear_act_dropout.h"

namespace mlpkit {

struct ColumnMoments {  // batch: of the rows of the region
  Region region;
  Dtype dtype;      // T
  const void* z;    // [total_rows, total_cols], T
  double* mean;     // [total_cols], written for the region's columns, as are
  double* squares;  // the sums of squared deviations from it
};

// What both directions read. batch: mean and inverse are [total_cols]; layer: [total_rows]; none: nullptr. All are C.
struct Normalisation {
  Norm norm;
  double eps;
  void* mean;          // written by the forward pass of layer, otherwise read
  void* inverse;       // 1 / sqrt(variance + eps), likewise
  const void* weight;  // [total_cols], or nullptr for 1
  const void* bias;    // [total_cols], or nullptr for 0
};

struct NormActDropoutForward {
  Region region;
  Dtype dtype;
  Normalisation norm;
  Activation activation;
  Dropout dropout;
  double negative_slope;
  const void* slope;   // [total_cols], C: prelu's; otherwise nullptr
  const void* z;       // [total_rows, total_cols], T
  void* y;             // same shape, T
  uint16_t* keep;      // [row tiles, col tiles, 16 rows], as ActDropoutForward's, or nullptr
  uint16_t* positive;  // same shape, or nullptr
};

struct NormActDropoutBackward {  // g = du weight,  du = dy * mask * scale * act'(u)
  Region region;
  Dtype dtype;
  Normalisation norm;
  Activation activation;
  Dropout dropout;
  double negative_slope;
  const void* slope;
  const void* dy;  // [total_rows, total_cols], T
  const void* z;   // as given to the forward pass; not read without a norm where the activation does not need it
  const uint16_t* keep;
  const uint16_t* positive;
  void* g;        // [total_rows, total_cols], C
  void* dbias;    // [total_cols], C: the region's column sums of du are added, or nullptr
  void* dweight;  // [total_cols], C: of du * x, or nullptr
  void* dslope;   // [total_cols], C: of dy * mask * scale * min(u, 0), or nullptr
};

struct NormBackward {  // dz = inverse (g - mean(g) - x mean(g x))
  Region region;
  Dtype dtype;
  Normalisation norm;
  const void* z;
  const void* g;        // [total_rows, total_cols], C; may be dz itself
  const void* mean_g;   // [total_cols], C: batch; nullptr for 0, and for layer, whose rows give their own
  const void* mean_gx;  // likewise
  void* dz;             // [total_rows, total_cols], T
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(column_moments, ColumnMoments)
MLPKIT_CPU_KERNEL(norm_act_dropout_forward, NormActDropoutForward)
MLPKIT_CPU_KERNEL(norm_act_dropout_backward, NormActDropoutBackward)
MLPKIT_CPU_KERNEL(norm_backward, NormBackward)
