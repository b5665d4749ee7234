// The element-wise halves of linear_act_dropout on a CUDA device: one pass over the (rows, cols) output each, queued on
// a stream (cuda). All pointers are device pointers; nothing is allocated, nothing waits. T is the dtype, C the compute
// type: double for double, else float.
#pragma once
#include <cuda_runtime_api.h>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"

namespace mlpkit::cuda {

// Bit planes: [row tiles, col tiles, 32 lanes], a byte a lane of the mask contract; bit 2 w + h of it belongs to the
// element that half h of the lane's word w decides about. keep: the element is kept (and, for relu, not z <= 0).
// positive: z > 0 (leaky_relu).
struct ActDropoutForward {  // y = act(z) * mask * scale,  z = product + bias
  int64_t rows, cols;
  int64_t first_tile;  // of the mask contract: 0, or where these rows begin in the output they are a panel of
  Dtype dtype;
  Activation activation;
  double negative_slope;
  Dropout dropout;      // its seed and offset are ignored
  const int64_t* seed;  // [2]: seed and offset, read by the kernel; nullptr where the threshold is 0 or 65536
  const void* product;  // [rows, cols], C: x W^T; may be y itself where T is C
  const void* bias;     // [cols], T, or nullptr
  const void* slope;    // [slopes], T: prelu's; otherwise nullptr
  int64_t slopes;       // 1 or cols
  void* y;              // [rows, cols], T
  void* z;              // [rows, cols], T, or nullptr where backward does not need it
  uint8_t* keep;        // or nullptr
  uint8_t* positive;    // or nullptr
};

struct ActDropoutBackward {  // dz = dy * mask * scale * act'(z)
  int64_t rows, cols;
  Dtype dtype;
  Activation activation;
  double negative_slope;
  double scale;       // of the dropout
  const void* dy;     // [rows, cols], T
  const void* z;      // as saved by the forward pass, like keep and positive
  const void* slope;  // [slopes], T, or nullptr
  int64_t slopes;
  const uint8_t* keep;
  const uint8_t* positive;
  void* dz;       // [rows, cols], T, or nullptr where dz = dy
  void* dbias;    // [cols], T: column sums of dz, or nullptr
  void* dslope;   // [slopes], T: column sums of dy * mask * scale * min(z, 0), or nullptr
  void* scratch;  // scratch_elements(rows, cols) of C where dbias or dslope is wanted, 16-byte aligned
};

int64_t scratch_elements(int64_t rows, int64_t cols);

cudaError_t act_dropout_forward(const ActDropoutForward&, cudaStream_t);
cudaError_t act_dropout_backward(const ActDropoutBackward&, cudaStream_t);

}  // namespace mlpkit::cuda
