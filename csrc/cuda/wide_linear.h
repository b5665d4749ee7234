// linear_act_dropout where in_features and out_features are large: the matrix product with everything that follows it
// in its epilogue (cuda). CUTLASS kernels for compute capability 9.0, built where its headers are found. For bf16 and
// f16; pointers are device pointers; nothing is allocated, nothing waits.
#pragma once
#include <cuda_runtime_api.h>

#include "core/activation.h"
#include "core/dropout_mask.h"
#include "core/dtype.h"

namespace mlpkit::cuda {

// How the two groups of warps that compute share their work: on one tile together, or each on a tile of its own, so
// that one's epilogue runs beside the other's products.
enum class WideSchedule : int { cooperative, pingpong };

// Of the elements that were written: the largest finite magnitude, as a bit pattern of T, and whether there are any
// that are not finite. Set to zero before the launch.
struct WideCensus {
  uint32_t largest, nonfinite;
};

// Bit planes, seed, activation: as in cuda/linear_act_dropout.h. Pointers to elements of T are 16-byte aligned.
struct WideForward {  // y = act(z) * mask * scale,  z = x W^T + bias
  int64_t rows, cols, depth;
  Dtype dtype;
  WideSchedule schedule;
  Activation activation;  // not prelu
  double negative_slope;
  Dropout dropout;      // its seed and offset are ignored
  const int64_t* seed;  // [2], or nullptr where the threshold is 0 or 65536
  const void* x;        // [rows, depth], T
  const void* weight;   // [cols, depth], T
  const void* bias;     // [cols], T, or nullptr
  void* y;              // [rows, cols], T
  void* z;              // [rows, cols], T, or nullptr
  uint8_t* keep;        // or nullptr
  uint8_t* positive;    // or nullptr
  WideCensus* census;   // or nullptr
};

// The gradient by y of a layer, from that by z of the layer that follows it, and at once the gradient by its z.
struct WideBackward {         // dz = dy * mask * scale * act'(z),  dy = next_dz W
  int64_t rows, cols, depth;  // cols: this layer's out_features; depth: the next one's
  Dtype dtype;
  Activation activation;  // not prelu
  double negative_slope;
  double scale;         // of the dropout
  const void* next_dz;  // [rows, depth], T
  const void* weight;   // [depth, cols], T: the next layer's
  const void* z;        // as saved by the forward pass, like keep and positive; nullptr where the slope needs no z
  const uint8_t* keep;
  const uint8_t* positive;
  void* dz;       // [rows, cols], T
  void* dbias;    // [cols], T: column sums of dz, or nullptr
  void* scratch;  // wide_scratch_elements(rows, cols) floats where dbias is wanted
};

// Whether the kernels were built, and whether they can take a layer; on a device of compute capability 9.0 alone.
bool wide_built();
bool wide_takes(Dtype dtype, Activation activation, int64_t rows, int64_t cols, int64_t depth);

int64_t wide_scratch_elements(int64_t rows, int64_t cols);

// cudaErrorNotSupported where the kernels were not built.
cudaError_t wide_forward(const WideForward&, cudaStream_t);
cudaError_t wide_backward(const WideBackward&, cudaStream_t);

}  // namespace mlpkit::cuda
