// A matrix product of one tile in fp32, for operands in float32, bfloat16 or float16 (cpu). Sums go by blocks along the
// depth (256, or 32 where there are few rows or columns): a block is summed in registers and the blocks are added up,
// so that no single fp32 chain grows long.
#pragma once
#include <cstddef>

#include "core/dtype.h"
#include "cpu/capability.h"

namespace mlpkit {

struct GemmTile {  // c = op(a) op(b);  op(a) is [rows, depth], op(b) is [depth, cols], c is [rows, cols]
  Dtype dtype_a, dtype_b;
  bool transpose_a, transpose_b;
  int64_t rows, cols, depth;  // rows <= kGemmRows, cols <= kGemmCols
  const void* a;              // [rows, depth] with row stride lda, or [depth, rows] where transpose_a
  int64_t lda;
  const void* b;  // [depth, cols] with row stride ldb, or [cols, depth] where transpose_b
  int64_t ldb;
  float* c;
  int64_t ldc;
  void* scratch;  // kGemmScratchBytes, 64-byte aligned
};

constexpr int64_t kGemmRows = 256, kGemmCols = 256, kGemmDepth = 256;
// The copy of a has rows of at most this many floats: not a power of two, so that its rows do not fight for the same
// cache sets.
constexpr int64_t kGemmStride = kGemmDepth + 16;
constexpr size_t kGemmScratchBytes = sizeof(float) * (kGemmDepth * kGemmCols + kGemmRows * kGemmStride);

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(gemm_tile, GemmTile)

namespace mlpkit::isa_avx512_bf16 {
// Both operands bfloat16; for Capability::avx512_bf16 alone.
void gemm_tile_of_pairs(const GemmTile&);
}  // namespace mlpkit::isa_avx512_bf16
