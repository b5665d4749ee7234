// The steps of a product, whatever a lane holds: one number in fp32, or a pair of bfloat16 along the depth (cpu). b is
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
constexpr int64_t kShortSum = 32;  // numbers in a block where there are few rows or columns

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

// Panels of op(b): panel p holds columns p * kBlockCols and on as [lanes along the depth, kBlockCols], zeros where b
// ends. Line by line of b, because a column of narrow pieces would touch a page for each; lines ahead are fetched
// early, since they lie too far apart for the hardware to guess.
template <class Lane>
void pack_lines(const GemmPack& g) {
  constexpr int64_t per_lane = Lane::per_lane, ahead = 8;
  const auto* b = static_cast<const typename Lane::Number*>(g.b);
  const int64_t steps = (g.depth + per_lane - 1) / per_lane;
  const int64_t width = (g.cols + kBlockCols - 1) / kBlockCols * kBlockCols;
  for (int64_t k = 0; k < steps; ++k) {
    const auto* line = b + k * per_lane * g.ldb;
    for (int64_t first = 0; first < width; first += kLanes) {
      for (int64_t i = 0; i < per_lane; ++i) __builtin_prefetch(line + (ahead * per_lane + i) * g.ldb + first);
      store(g.panels + first / kBlockCols * kBlockCols * steps + first % kBlockCols + k * kBlockCols,
            Lane::across(line + first, g.ldb, g.depth - k * per_lane, g.cols > first ? g.cols - first : 0));
    }
  }
}

template <class Lane>
void pack_transposed(const GemmPack& g) {
  constexpr int64_t per_lane = Lane::per_lane;
  const auto* b = static_cast<const typename Lane::Number*>(g.b);
  const int64_t steps = (g.depth + per_lane - 1) / per_lane;
  for (int64_t first = 0; first < (g.cols + kBlockCols - 1) / kBlockCols * kBlockCols; first += kLanes) {
    float* panel = g.panels + first / kBlockCols * kBlockCols * steps + first % kBlockCols;
    const int64_t n = g.cols > first ? g.cols - first : 0;
    for (int64_t k = 0; k < steps; k += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = i < n ? Lane::along(b + (first + i) * g.ldb + k * per_lane, g.depth - k * per_lane) : FloatVec{};
      transpose(v);
      for (int i = 0; i < smaller(kLanes, steps - k); ++i) store(panel + (k + i) * kBlockCols, v[i]);
    }
  }
}

template <class Lane>
MLPKIT_HD void pack(const GemmPack& g) {
  g.transposed ? pack_transposed<Lane>(g) : pack_lines<Lane>(g);
}

// Copies op(a) lane by lane: strides of a power of two, as wide layers have, would evict each other.
template <class Lane>
void copy_lanes(const GemmLanes& g) {
  constexpr int64_t per_lane = Lane::per_lane;
  const auto* a = static_cast<const typename Lane::Number*>(g.a);
  const int64_t steps = (g.depth + per_lane - 1) / per_lane;
  if (g.transposed) {
    for (int64_t k = 0; k < steps; ++k)
      for (int64_t i = 0; i < g.rows; i += kLanes)
        store(g.lanes + k * kGemmStride + i,
              Lane::across(a + k * per_lane * g.lda + i, g.lda, g.depth - k * per_lane, g.rows - i));
    return;
  }
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t k = 0; k < steps; k += kLanes)
      store(g.lanes + i * kGemmStride + k, Lane::along(a + i * g.lda + k * per_lane, g.depth - k * per_lane));
}

// Where lanes of op(a) lie, and how far they are apart along rows and depth.
struct Rows {
  const float* data;
  int64_t row_stride, depth_stride;
};

// The rows that are to be fetched, one after the other: of the two matrices in turn.
class Fetching {
 public:
  // Spread evenly over so many products.
  Fetching(const GemmFetch& fetch, int64_t products)
      : fetch_(fetch), rows_(2 * fetch.rows), share_(products ? (rows_ + products - 1) / products : 0) {}
  bool any() const { return rows_ > 0; }
  // Calls body(line, lines) for each row of one product's share, until it says that it has no time left.
  template <class Body>
  MLPKIT_HD void each_row(Body&& body) {
    for (const int64_t end = smaller(next_ + share_, rows_); next_ < end; ++next_) {
      const GemmFetch::Matrix& matrix = fetch_.matrices[next_ % 2];
      if (matrix.width && !body(static_cast<const char*>(matrix.data) + next_ / 2 * matrix.stride,
                                (matrix.width + kLineBytes - 1) / kLineBytes))
        return;
    }
  }
  static constexpr int64_t kLineBytes = 64;

 private:
  const GemmFetch& fetch_;
  int64_t rows_, share_, next_ = 0;
};

template <class Lane, int rows, bool fetches = false>
void block(const Rows& a, const float* panel, int64_t steps, float* c, int64_t ldc, int64_t cols, bool add,
           Fetching* fetching = nullptr) {
  FloatVec sums[rows][kBlockVecs] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    FloatVec b[kBlockVecs];
    for (int j = 0; j < kBlockVecs; ++j) load(panel + k * kBlockCols + j * kLanes, b[j]);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const FloatVec broadcast = repeat(a.data + i * a.row_stride + k * a.depth_stride);
      for (int j = 0; j < kBlockVecs; ++j) sums[i][j] = Lane::multiply_add(broadcast, b[j], sums[i][j]);
    }
  };
  int64_t k = 0;
  if constexpr (fetches)
    fetching->each_row([&](const char* line, int64_t lines) __attribute__((always_inline)) {
      const int64_t end = smaller(k + lines, steps);
      for (; k < end; ++k, line += Fetching::kLineBytes) {
        __builtin_prefetch(line, 0, 2);
        step(k);
      }
      return k < steps;
    });
  for (; k < steps; ++k) step(k);
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

template <class Lane>
void multiply(const GemmMultiply& g) {
  const bool few = g.rows < kGemmFewLines || g.cols < kGemmFewLines;
  const int64_t steps = (g.depth + Lane::per_lane - 1) / Lane::per_lane;
  const int64_t longest = few ? kShortSum / Lane::per_lane : kGemmDepth;
  Fetching fetching(g.fetch, (g.cols + kBlockCols - 1) / kBlockCols * (g.rows / kBlockRows));
  int64_t k = 0;
  do {  // once even where the depth is 0, to write the zeros
    const int64_t depth = smaller(longest, steps - k);
    for (int64_t col = 0; col < g.cols; col += kBlockCols)
      for (int64_t row = 0; row < g.rows; row += kBlockRows) {
        const Rows a{g.lanes + row * g.row_stride + k * g.depth_stride, g.row_stride, g.depth_stride};
        const float* panel = g.panels + col * steps + k * kBlockCols;
        float* c = g.c + row * g.ldc + col;
        const int64_t cols = smaller(kBlockCols, g.cols - col);
        const bool add = g.add || k > 0;
        if (fetching.any() && g.rows - row >= kBlockRows)
          block<Lane, kBlockRows, true>(a, panel, depth, c, g.ldc, cols, add, &fetching);
        else
          block_of<Lane, kBlockRows>(g.rows - row, a, panel, depth, c, g.ldc, cols, add);
      }
    k += longest;
  } while (k < steps);
}

MLPKIT_END_ISA
