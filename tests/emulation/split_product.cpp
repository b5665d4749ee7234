// The launch function of csrc/cuda/split_product.h with flat arguments, for ctypes (emulation).
#include "cuda/split_product.h"

using namespace mlpkit;

extern "C" {

int emulate_split_takes(int64_t rows, int64_t cols, int64_t depth, int layout) {
  return cuda::split_takes({rows, cols, depth, static_cast<cuda::SplitLayout>(layout), nullptr, nullptr, nullptr});
}

int emulate_split_product(int64_t rows, int64_t cols, int64_t depth, int layout, const float* a, const float* b,
                          float* c) {
  return cuda::split_product({rows, cols, depth, static_cast<cuda::SplitLayout>(layout), a, b, c}, nullptr);
}

}  // extern "C"
