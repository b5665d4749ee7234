// The launch functions of csrc/cuda/linear_act_dropout_thin.h with flat arguments, for ctypes (emulation).
#include "cuda/linear_act_dropout_thin.h"

using namespace mlpkit;

extern "C" {

int emulate_thin_takes(int dtype, int64_t depth) { return cuda::thin_takes(static_cast<Dtype>(dtype), depth); }

int64_t emulate_thin_scratch(int64_t rows, int64_t cols, int64_t depth) {
  return cuda::thin_scratch_elements(rows, cols, depth);
}

int emulate_thin_forward(int64_t rows, int64_t cols, int64_t depth, int dtype, int activation, double negative_slope,
                         double p, uint32_t stream, const int64_t* seed, const void* x, const void* weight,
                         const void* bias, const void* slope, int64_t slopes, void* y, void* z, uint8_t* keep,
                         uint8_t* positive) {
  Dropout dropout;
  dropout.stream = stream;
  dropout.threshold = dropout_threshold(p);
  dropout.scale = dropout_scale(dropout.threshold);
  return cuda::thin_forward({rows, cols, depth, static_cast<Dtype>(dtype), static_cast<Activation>(activation),
                             negative_slope, dropout, seed, x, weight, bias, slope, slopes, y, z, keep, positive},
                            nullptr);
}

int emulate_thin_backward(int64_t rows, int64_t cols, int64_t depth, int dtype, int activation, double negative_slope,
                          double p, const void* dy, const void* x, const void* weight, const void* z, const void* slope,
                          int64_t slopes, const uint8_t* keep, const uint8_t* positive, void* dx, void* dweight,
                          void* dbias, void* dslope, float* scratch) {
  return cuda::thin_backward({rows,
                              cols,
                              depth,
                              static_cast<Dtype>(dtype),
                              static_cast<Activation>(activation),
                              negative_slope,
                              dropout_scale(dropout_threshold(p)),
                              dy,
                              x,
                              weight,
                              z,
                              slope,
                              slopes,
                              keep,
                              positive,
                              dx,
                              dweight,
                              dbias,
                              dslope,
                              scratch},
                             nullptr);
}

}  // extern "C"
