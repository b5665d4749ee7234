// The element-wise halves of linear_act_dropout on the CPU, one pass each over a region of the (rows, cols) output
// (cpu). C is the compute type: double where T is double, float otherwise. A region starts at a multiple of 16 in both
// directions.
#pragma once
#include <cstddef>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"
#include "cpu/capability.h"

namespace mlpkit {

struct Region {  // of a (total_rows, total_cols) output
  int64_t row, rows, col, cols, total_cols;
};

struct ActDropoutForward {  // y = act(z) * mask * scale,  z = product + bias
  Region region;
  Dtype dtype;  // T
  Activation activation;
  Dropout dropout;
  double negative_slope;
  const void* product;  // [region.rows, region.cols], C, row stride product_stride: x W^T of the region
  int64_t product_stride;
  const void* bias;   // [total_cols], C, or nullptr
  const void* slope;  // [total_cols], C: prelu's; otherwise nullptr
  void* y;            // [total_rows, total_cols], T
  void*
      saved;  // [total_rows, total_cols]: act'(z), float16 where T is bfloat16, or prelu's z; nullptr where not needed
  uint16_t* keep;      // [row tiles, col tiles, 16 rows]: bit c is set where an element is kept (relu: and lives)
  uint16_t* positive;  // same shape: set where z > 0 (leaky_relu); otherwise nullptr
  double* absmax;      // raised to the largest |y| of the region, above which only a NaN counts; or nullptr
};

// dz of a region, as the products of the backward pass read it: whole groups of 16 columns, those beyond the output
// zero. Either numbers of type C, or pairs of bfloat16 side by side along the columns (for dz W) and once more along
// the rows (for dz^T x).
struct DzTile {
  void* data;      // [region.rows, stride], C or bfloat16
  int64_t stride;  // in numbers
  uint32_t*
      down;  // [ceil(region.rows / 2), down_stride]: row 2i in the low half, row 2i + 1 in the high one; or nullptr
  int64_t down_stride;
};

struct ActDropoutBackward {  // dz = dy * mask * scale * act'(z)
  Region region;
  Dtype dtype;
  Activation activation;
  Dropout dropout;
  double negative_slope;
  const void* dy;        // [total_rows, total_cols], T
  const void* saved;     // by the forward pass
  const void* slope;     // as given to the forward pass
  const uint16_t* keep;  // as saved by the forward pass
  const uint16_t* positive;
  DzTile dz;
  void* dbias;   // [total_cols], C: the region's column sums of dz are added, or nullptr
  void* dslope;  // [total_cols], C: the region's column sums of dy * mask * scale * min(z, 0) are added, or nullptr
};

struct Convert {  // to = from, count elements; one of the two dtypes is float32
  Dtype from_dtype, to_dtype;
  const void* from;
  void* to;
  int64_t count;
};

// The larger of two magnitudes as the bits order them: a NaN is above all numbers.
inline double larger_magnitude(double a, double b) { return a != a || a > b ? a : b; }

inline int64_t mask_tiles(int64_t extent) { return (extent + kMaskTile - 1) / kMaskTile; }

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(act_dropout_forward, ActDropoutForward)
MLPKIT_CPU_KERNEL(act_dropout_backward, ActDropoutBackward)
MLPKIT_CPU_KERNEL(convert, Convert)
