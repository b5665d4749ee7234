// Matrix products of fp32 on the tensor cores, each number split in two of tf32 (cuda). For compute capability 8.0 and
// newer; pointers are device pointers to 16-byte boundaries; nothing is allocated, nothing waits.
//
// The method: Ootomo, Yokota: Recovering single precision accuracy from Tensor Cores while surpassing the FP32
// theoretical peak performance (2022).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace mlpkit::cuda {

// How the operands of a layer's three products lie in memory. All are stored by rows, without gaps.
enum class SplitLayout : int {
  of_weight,       // c = a b^T,  a [rows, depth], b [cols, depth]: x W^T
  plain,           // c = a b,    a [rows, depth], b [depth, cols]: dz W
  of_transposed_a  // c = a^T b,  a [depth, rows], b [depth, cols]: dz^T x
};

struct SplitProduct {
  int64_t rows, cols, depth;  // c is [rows, cols], a sum over depth
  SplitLayout layout;
  const float* a;
  const float* b;
  float* c;
};

// Whether the current device can, and whether the rows of all three matrices are whole multiples of 16 bytes.
bool split_takes(const SplitProduct&);
// Whether there is work enough for the whole device.
bool split_pays(const SplitProduct&);

cudaError_t split_product(const SplitProduct&, cudaStream_t);

}  // namespace mlpkit::cuda
