// The product of one tile, whatever a lane holds: one number in fp32, or a pair of bfloat16 along the depth (cpu). b is
// packed into panels as wide as two vectors, a is read by broadcasts, a block of c stays in registers: with 12 x 2
// accumulators of 16 lanes, a step along the depth is 24 multiply-adds for 14 loads. Included by the gemm kernels only.
#pragma once
#include "cpu/gemm.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6;
#else
constexpr int kBlockRows = 4;
#endif
constexpr int kBlockVecs = 2, kBlockCols = kBlockVecs * kLanes;
constexpr int64_t kFewLines = 16, kShortSum = 32;

MLPKIT_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What a 32-bit lane of a packed operand holds. along: kLanes lanes from one line of memory, of which `numbers` numbers
// are there. across: kLanes lanes side by side, each taking its numbers from `lines` lines that lie `stride` apart.
template <class T>
struct Single {  // one number, as float
  using Number = T;
  static constexpr int64_t per_lane = 1;
  MLPKIT_HD static FloatVec along(const T* from, int64_t numbers) {
    FloatVec v;
    if (numbers >= kLanes) {
      load(from, v);
    } else {
      T padded[kLanes] = {};
      __builtin_memcpy(padded, from, numbers * sizeof(T));
      load(padded, v);
    }
    return v;
  }
  MLPKIT_HD static FloatVec across(const T* from, int64_t, int64_t, int64_t numbers) { return along(from, numbers); }
  MLPKIT_HD static FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec sum) { return sum + a * b; }
};

#if defined(__AVX512F__)
#define MLPKIT_LOW_LANES {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define MLPKIT_HIGH_LANES {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif defined(__AVX2__)
#define MLPKIT_LOW_LANES {0, 8, 1, 9, 2, 10, 3, 11}
#define MLPKIT_HIGH_LANES {4, 12, 5, 13, 6, 14, 7, 15}
#else
#define MLPKIT_LOW_LANES {0, 4, 1, 5}
#define MLPKIT_HIGH_LANES {2, 6, 3, 7}
#endif

// Transposes kLanes x kLanes numbers: log2(kLanes) perfect shuffles of row i with row i + kLanes / 2.
MLPKIT_HD void transpose(FloatVec (&v)[kLanes]) {
  constexpr IntVec low = MLPKIT_LOW_LANES, high = MLPKIT_HIGH_LANES;
  for (int stride = 1; stride < kLanes; stride *= 2) {
    FloatVec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// The same 32 bits in every lane; as bits, since a pair may look like a signalling NaN.
MLPKIT_HD FloatVec repeat(const float* lane) { return (FloatVec)(IntVec{} + load_bits<int32_t>(lane)); }

// Panels of a [depth, cols] block of b: panel p holds columns p * kBlockCols and on as [lanes along the depth,
// kBlockCols], zeros where b ends.
template <class Lane>
void pack(const typename Lane::Number* b, int64_t ldb, bool transposed, int64_t depth, int64_t cols, float* panels) {
  constexpr int64_t per_lane = Lane::per_lane;
  const int64_t steps = (depth + per_lane - 1) / per_lane;
  for (int64_t first = 0; first < (cols + kBlockCols - 1) / kBlockCols * kBlockCols; first += kLanes) {
    float* panel = panels + first / kBlockCols * kBlockCols * steps + first % kBlockCols;
    const int64_t n = cols > first ? cols - first : 0;
    if (!transposed) {
      for (int64_t k = 0; k < steps; ++k)
        store(panel + k * kBlockCols, Lane::across(b + k * per_lane * ldb + first, ldb, depth - k * per_lane, n));
      continue;
    }
    for (int64_t k = 0; k < steps; k += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = i < n ? Lane::along(b + (first + i) * ldb + k * per_lane, depth - k * per_lane) : FloatVec{};
      transpose(v);
      for (int i = 0; i < smaller(kLanes, steps - k); ++i) store(panel + (k + i) * kBlockCols, v[i]);
    }
  }
}

// op(a), packed: where it lies and how far its lanes are apart along rows and depth.
struct Rows {
  const float* data;
  int64_t row_stride, depth_stride;
};

// Copies a [rows, depth] block of op(a) lane by lane: strides of a power of two, as wide layers have, would evict each
// other.
template <class Lane>
Rows copy(const typename Lane::Number* a, int64_t lda, bool transposed, int64_t rows, int64_t depth, float* to) {
  constexpr int64_t per_lane = Lane::per_lane;
  const int64_t steps = (depth + per_lane - 1) / per_lane;
  if (transposed) {
    for (int64_t k = 0; k < steps; ++k)
      for (int64_t i = 0; i < rows; i += kLanes)
        store(to + k * kGemmStride + i, Lane::across(a + k * per_lane * lda + i, lda, depth - k * per_lane, rows - i));
    return {to, 1, kGemmStride};
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < steps; k += kLanes)
      store(to + i * kGemmStride + k, Lane::along(a + i * lda + k * per_lane, depth - k * per_lane));
  return {to, kGemmStride, 1};
}

template <class Lane, int rows>
void block(const Rows& a, const float* panel, int64_t steps, float* c, int64_t ldc, int64_t cols, bool add) {
  FloatVec sums[rows][kBlockVecs] = {};
  for (int64_t k = 0; k < steps; ++k) {
    FloatVec b[kBlockVecs];
    for (int j = 0; j < kBlockVecs; ++j) load(panel + k * kBlockCols + j * kLanes, b[j]);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const FloatVec broadcast = repeat(a.data + i * a.row_stride + k * a.depth_stride);
      for (int j = 0; j < kBlockVecs; ++j) sums[i][j] = Lane::multiply_add(broadcast, b[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    float edge[kBlockCols];
    float* to = cols == kBlockCols ? c + i * ldc : edge;
    if (add && cols < kBlockCols) __builtin_memcpy(edge, c + i * ldc, cols * sizeof(float));
    for (int j = 0; j < kBlockVecs; ++j) {
      FloatVec before;
      load(to + j * kLanes, before);
      store(to + j * kLanes, add ? before + sums[i][j] : sums[i][j]);
    }
    if (cols < kBlockCols) __builtin_memcpy(c + i * ldc, edge, cols * sizeof(float));
  }
}

// The last rows of a tile: the same block with fewer rows, chosen at run time.
template <class Lane, int rows>
MLPKIT_HD void block_of(int64_t wanted, const Rows& a, const float* panel, int64_t steps, float* c, int64_t ldc,
                        int64_t cols, bool add) {
  if constexpr (rows > 1) {
    if (wanted < rows) return block_of<Lane, rows - 1>(wanted, a, panel, steps, c, ldc, cols, add);
  }
  block<Lane, rows>(a, panel, steps, c, ldc, cols, add);
}

template <class LaneA, class LaneB>
void product(const GemmTile& g) {
  constexpr int64_t per_lane = LaneA::per_lane;
  // A product with few rows or columns costs its memory traffic, so its sums may be short ones: the library's
  // matrix-vector product, which it is held against, sums in many chains.
  const int64_t longest = g.rows < kFewLines || g.cols < kFewLines ? kShortSum : kGemmDepth * per_lane;
  float* panels = static_cast<float*>(g.scratch);
  float* copied = panels + kGemmDepth * kGemmCols;
  int64_t k = 0;
  do {  // once even where the depth is 0, to write the zeros
    const int64_t depth = smaller(longest, g.depth - k), steps = (depth + per_lane - 1) / per_lane;
    pack<LaneB>(static_cast<const typename LaneB::Number*>(g.b) + (g.transpose_b ? k : k * g.ldb), g.ldb, g.transpose_b,
                depth, g.cols, panels);
    const Rows a = copy<LaneA>(static_cast<const typename LaneA::Number*>(g.a) + (g.transpose_a ? k * g.lda : k), g.lda,
                               g.transpose_a, g.rows, depth, copied);
    for (int64_t col = 0; col < g.cols; col += kBlockCols)
      for (int64_t row = 0; row < g.rows; row += kBlockRows)
        block_of<LaneA, kBlockRows>(g.rows - row, {a.data + row * a.row_stride, a.row_stride, a.depth_stride},
                                    panels + col * steps, steps, g.c + row * g.ldc + col, g.ldc,
                                    smaller(kBlockCols, g.cols - col), k > 0);
    k += longest;
  } while (k < g.depth);
}

MLPKIT_END_ISA
