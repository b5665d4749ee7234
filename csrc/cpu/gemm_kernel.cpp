// The product of one tile: b is packed into panels as wide as two vectors, a is read by broadcasts, a block of c stays
// in registers (cpu; compiled once for each instruction set). With 12 x 2 accumulators of 16 lanes, a step along the
// depth is 24 FMAs for 14 loads.
#include "cpu/gemm.h"

#include "cpu/simd.h"

MLPKIT_BEGIN_ISA
namespace {

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

// The first n of kLanes numbers as floats; the others are zero and their memory is not read.
template <class T>
MLPKIT_HD FloatVec load_some(const T* from, int64_t n) {
  FloatVec v;
  if (n >= kLanes) {
    load(from, v);
  } else {
    T padded[kLanes] = {};
    __builtin_memcpy(padded, from, n * sizeof(T));
    load(padded, v);
  }
  return v;
}

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

// Panels of a [depth, cols] block of b: panel p holds columns p * kBlockCols and on as [depth, kBlockCols], zeros where
// b ends.
template <class T>
void pack(const T* b, int64_t ldb, bool transposed, int64_t depth, int64_t cols, float* panels) {
  for (int64_t first = 0; first < cols; first += kLanes) {
    float* panel = panels + first / kBlockCols * kBlockCols * depth + first % kBlockCols;
    const int64_t n = cols - first;
    if (!transposed) {
      for (int64_t k = 0; k < depth; ++k) store(panel + k * kBlockCols, load_some(b + k * ldb + first, n));
      continue;
    }
    for (int64_t k = 0; k < depth; k += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = i < n ? load_some(b + (first + i) * ldb + k, depth - k) : FloatVec{};
      transpose(v);
      for (int i = 0; i < smaller(kLanes, depth - k); ++i) store(panel + (k + i) * kBlockCols, v[i]);
    }
  }
  // A panel's second vector may lie wholly beyond b.
  if (const int64_t end = (cols + kLanes - 1) / kLanes * kLanes; end % kBlockCols)
    for (int64_t k = 0; k < depth; ++k)
      store(panels + end / kBlockCols * kBlockCols * depth + end % kBlockCols + k * kBlockCols, FloatVec{});
}

// op(a) as floats: where they lie and how far apart along rows and depth.
struct Rows {
  const float* data;
  int64_t row_stride, depth_stride;
};

// Copies an (outer, inner) block of a as floats: strides of a power of two, as wide layers have, would evict each
// other.
template <class T>
void copy(const T* a, int64_t lda, int64_t outer, int64_t inner, float* to) {
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; j += kLanes) store(to + i * kGemmStride + j, load_some(a + i * lda + j, inner - j));
}

template <int rows>
void block(const Rows& a, const float* panel, int64_t depth, float* c, int64_t ldc, int64_t cols, bool add) {
  FloatVec sums[rows][kBlockVecs] = {};
  for (int64_t k = 0; k < depth; ++k) {
    FloatVec b[kBlockVecs];
    for (int j = 0; j < kBlockVecs; ++j) load(panel + k * kBlockCols + j * kLanes, b[j]);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const FloatVec broadcast = FloatVec{} + a.data[i * a.row_stride + k * a.depth_stride];
      for (int j = 0; j < kBlockVecs; ++j) sums[i][j] += broadcast * b[j];
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
template <int rows>
MLPKIT_HD void block_of(int64_t wanted, const Rows& a, const float* panel, int64_t depth, float* c, int64_t ldc,
                        int64_t cols, bool add) {
  if constexpr (rows > 1) {
    if (wanted < rows) return block_of<rows - 1>(wanted, a, panel, depth, c, ldc, cols, add);
  }
  block<rows>(a, panel, depth, c, ldc, cols, add);
}

template <class TA, class TB>
void product(const GemmTile& g) {
  float* panels = static_cast<float*>(g.scratch);
  float* copied = panels + kGemmDepth * kGemmCols;
  // A product with few rows or columns costs its memory traffic, so its sums may be short ones: the library's
  // matrix-vector product, which it is held against, sums in many chains.
  const int64_t longest = g.rows < kFewLines || g.cols < kFewLines ? kShortSum : kGemmDepth;
  int64_t k = 0;
  do {  // once even where the depth is 0, to write the zeros
    const int64_t depth = smaller(longest, g.depth - k);
    pack(static_cast<const TB*>(g.b) + (g.transpose_b ? k : k * g.ldb), g.ldb, g.transpose_b, depth, g.cols, panels);
    const TA* from = static_cast<const TA*>(g.a) + (g.transpose_a ? k * g.lda : k);
    const int64_t outer = g.transpose_a ? depth : g.rows, inner = g.transpose_a ? g.rows : depth;
    copy(from, g.lda, outer, inner, copied);
    const Rows a{copied, g.transpose_a ? 1 : kGemmStride, g.transpose_a ? kGemmStride : 1};
    for (int64_t col = 0; col < g.cols; col += kBlockCols)
      for (int64_t row = 0; row < g.rows; row += kBlockRows)
        block_of<kBlockRows>(g.rows - row, {a.data + row * a.row_stride, a.row_stride, a.depth_stride},
                             panels + col * depth, depth, g.c + row * g.ldc + col, g.ldc,
                             smaller(kBlockCols, g.cols - col), k > 0);
    k += longest;
  } while (k < g.depth);
}

template <class TA>
void product_with(const GemmTile& g) {
  switch (g.dtype_b) {
    case Dtype::bfloat16:
      return product<TA, BFloat16>(g);
    case Dtype::float16:
      return product<TA, Half>(g);
    default:
      return product<TA, float>(g);
  }
}

}  // namespace

void gemm_tile(const GemmTile& g) {
  switch (g.dtype_a) {
    case Dtype::bfloat16:
      return product_with<BFloat16>(g);
    case Dtype::float16:
      return product_with<Half>(g);
    default:
      return product_with<float>(g);
  }
}

MLPKIT_END_ISA
