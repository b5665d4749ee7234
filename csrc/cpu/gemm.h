// Matrix products in fp32 of operands in float32, bfloat16 or float16, in three steps that a caller puts together: pack
// op(b) into panels, pack op(a) into lanes, multiply (cpu). A lane is 32 bits: one number as float, or for bfloat16 on
// AVX-512 with bf16 a pair of neighbours along the depth, multiplied at twice the rate. Sums go by blocks along the
// depth (256 lanes, or 32 numbers where there are few rows or columns): a block is summed in registers and the blocks
// are added up, so that no single fp32 chain grows long.
#pragma once
#include <cstddef>

#include "core/dtype.h"
#include "cpu/capability.h"

namespace mlpkit {

constexpr int64_t kGemmRows = 256, kGemmCols = 256, kGemmDepth = 256;  // of one multiply at most; the depth in lanes
// Lanes in a row of packed a: not a power of two, so that rows do not fight for the same cache sets.
constexpr int64_t kGemmStride = kGemmDepth + 16;
constexpr int64_t kPanelFloats = kGemmDepth * kGemmCols, kLaneFloats = kGemmRows * kGemmStride;
// Fewer rows or columns than this are summed in short blocks: such a product costs its memory traffic anyhow, and the
// library's matrix-vector product, which it is held against, sums in many chains.
constexpr int64_t kGemmFewLines = 16;

struct GemmPack {  // panels = op(b), which is [depth, cols]
  Dtype dtype;
  bool transposed;  // b is [cols, depth] in memory
  int64_t depth, cols;
  const void* b;
  int64_t ldb;    // its row stride
  float* panels;  // kPanelFloats, 64-byte aligned
};

struct GemmLanes {  // lanes = op(a), which is [rows, depth]
  Dtype dtype;
  bool transposed;  // a is [depth, rows] in memory, and so are the lanes
  int64_t rows, depth;
  const void* a;
  int64_t lda;
  float* lanes;  // kLaneFloats, row stride kGemmStride
};

// Rows of up to two matrices that are wanted next. A product leaves the ways to memory idle, so they are fetched into
// the second-level cache while it runs, as many as it has time for.
struct GemmFetch {
  struct Matrix {
    const void* data;
    int64_t stride, width;  // of a row, in bytes; no width: nothing to fetch
  };
  Matrix matrices[2] = {};
  int64_t rows = 0;
};

struct GemmMultiply {  // c = op(a) op(b), or c += op(a) op(b)
  int64_t rows, cols, depth;
  const float* lanes;                // of op(a)
  int64_t row_stride, depth_stride;  // how far its lanes are apart
  const float* panels;               // of op(b)
  float* c;
  int64_t ldc;
  bool add;
  GemmFetch fetch = {};
};

}  // namespace mlpkit

MLPKIT_CPU_KERNEL(gemm_pack, GemmPack)
MLPKIT_CPU_KERNEL(gemm_lanes, GemmLanes)
MLPKIT_CPU_KERNEL(gemm_multiply, GemmMultiply)

namespace mlpkit::isa_avx512_bf16 {
// The same with pairs of bfloat16 in the lanes; for Capability::avx512_bf16 alone.
void gemm_pack_pairs(const GemmPack&);
void gemm_lanes_pairs(const GemmLanes&);
void gemm_multiply_pairs(const GemmMultiply&);
}  // namespace mlpkit::isa_avx512_bf16
