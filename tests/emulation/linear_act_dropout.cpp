// The launch functions of csrc/cuda/linear_act_dropout.h with flat arguments, for ctypes (emulation).
#include "cuda/linear_act_dropout.h"

using namespace mlpkit;

extern "C" {

int64_t emulate_scratch_elements(int64_t rows, int64_t cols) { return cuda::scratch_elements(rows, cols); }

int emulate_forward(int64_t rows, int64_t cols, int64_t first_tile, int dtype, int activation, double negative_slope,
                    double p, uint32_t stream, const int64_t* seed, const void* product, const void* bias,
                    const void* slope, int64_t slopes, void* y, void* z, uint8_t* keep, uint8_t* positive) {
  Dropout dropout;
  dropout.stream = stream;
  dropout.threshold = dropout_threshold(p);
  dropout.scale = dropout_scale(dropout.threshold);
  return cuda::act_dropout_forward(
      {rows, cols, first_tile, static_cast<Dtype>(dtype), static_cast<Activation>(activation), negative_slope, dropout,
       seed, product, bias, slope, slopes, y, z, keep, positive},
      nullptr);
}

int emulate_backward(int64_t rows, int64_t cols, int dtype, int activation, double negative_slope, double p,
                     const void* dy, const void* z, const void* slope, int64_t slopes, const uint8_t* keep,
                     const uint8_t* positive, void* dz, void* dbias, void* dslope, void* scratch) {
  return cuda::act_dropout_backward(
      {rows, cols, static_cast<Dtype>(dtype), static_cast<Activation>(activation), negative_slope,
       dropout_scale(dropout_threshold(p)), dy, z, slope, slopes, keep, positive, dz, dbias, dslope, scratch},
      nullptr);
}

}  // extern "C"
