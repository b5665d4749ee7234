// linear_act_dropout where in_features is small: product, bias, activation and dropout in one kernel, and all gradients
// without a dz in memory (cuda). For bf16 and f16; pointers are device pointers; nothing is allocated, nothing waits.
#pragma once
#include <cuda_runtime_api.h>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"

namespace mlpkit::cuda {

// Bit planes, seed, activation and slopes: as in cuda/linear_act_dropout.h.
struct ThinForward {  // y = act(z) * mask * scale,  z = x W^T + bias
  int64_t rows, cols, depth;
  Dtype dtype;
  Activation activation;
  double negative_slope;
  Dropout dropout;      // its seed and offset are ignored
  const int64_t* seed;  // [2], or nullptr where the threshold is 0 or 65536
  const void* x;        // [rows, depth], T, 16-byte aligned
  const void* weight;   // [cols, depth], T, 16-byte aligned
  const void* bias;     // [cols], T, or nullptr
  const void* slope;    // [slopes], T: prelu's; otherwise nullptr
  int64_t slopes;       // 1 or cols
  void* y;              // [rows, cols], T
  void* z;              // [rows, cols], T, or nullptr
  uint8_t* keep;        // or nullptr
  uint8_t* positive;    // or nullptr
};

struct ThinBackward {  // dz = dy * mask * scale * act'(z);  dx = dz W,  dweight = dz^T x,  dbias = column sums of dz
  int64_t rows, cols, depth;
  Dtype dtype;
  Activation activation;
  double negative_slope;
  double scale;        // of the dropout
  const void* dy;      // [rows, cols], T
  const void* x;       // [rows, depth], T, 16-byte aligned
  const void* weight;  // [cols, depth], T, 16-byte aligned
  const void* z;       // as saved by the forward pass, like keep and positive
  const void* slope;   // [slopes], T, or nullptr
  int64_t slopes;
  const uint8_t* keep;
  const uint8_t* positive;
  void* dx;        // [rows, depth], T, or nullptr
  void* dweight;   // [cols, depth], T, or nullptr
  void* dbias;     // [cols], T, or nullptr
  void* dslope;    // [slopes], T, or nullptr
  float* scratch;  // thin_scratch_elements, 16-byte aligned
};

// Whether these kernels can take the layer on the current device: dtype, a depth that is a multiple of 16 up to 256,
// compute capability 8.0, enough shared memory.
bool thin_takes(Dtype dtype, int64_t depth);

// For the current device: partial sums go there.
int64_t thin_scratch_elements(int64_t rows, int64_t cols, int64_t depth);

cudaError_t thin_forward(const ThinForward&, cudaStream_t);
cudaError_t thin_backward(const ThinBackward&, cudaStream_t);

}  // namespace mlpkit::cuda
