// Matrix products and copies with 32 rows of a batch in the lanes of one or more vectors (cpu). A panel is [columns, 32
// rows]; a block of it is [32 rows, 32 columns]. Included by the mlp_step kernels only.
#pragma once
#include "cpu/gemm_block.h"
#include "cpu/mlp_step.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

static_assert(kPanel % kBlockCols == 0 && kPanel % kLanes == 0);

struct Strided {  // a matrix that is read by broadcasts
  const float* data;
  int64_t row_stride, depth_stride;
};

// What is multiplied: one number in a lane. A format of pairs is in mlp_step_avx512_bf16.cpp.
struct OneInALane {
  static constexpr int64_t per_lane = 1;
  MLPKIT_HD static FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec sum) { return sum + a * b; }
  MLPKIT_HD static FloatVec sum_of(FloatVec lanes) { return lanes; }  // of the numbers of each lane
};

template <class Lane>
MLPKIT_HD int64_t lanes_of(int64_t numbers) {
  return (numbers + Lane::per_lane - 1) / Lane::per_lane;
}

// sums[i] += sum over k of a(i, k) times the vectors at b + 32 k
template <class Lane, int rows, int vecs>
MLPKIT_HD void multiply_add(const Strided& a, const float* b, int64_t depth, FloatVec (&sums)[rows][vecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    FloatVec v[vecs];
    for (int j = 0; j < vecs; ++j) load(b + k * kPanel + j * kLanes, v[j]);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const FloatVec broadcast = repeat(a.data + i * a.row_stride + k * a.depth_stride);
      for (int j = 0; j < vecs; ++j) sums[i][j] = Lane::multiply_add(broadcast, v[j], sums[i][j]);
    }
  }
}

// How many lanes one fp32 sum may run through. Where there are few lines the sums are short: the library's
// matrix-vector product, which those are held against, sums in many chains.
MLPKIT_HD int64_t longest_sum(int64_t lines) { return lines < kGemmFewLines ? kShortSum : kGemmDepth; }

// c = a b for a few rows of a; b is a panel [depth, 32], c one [rows, 32].
template <class Lane, int rows>
void product_of_rows(const Strided& a, const float* b, int64_t depth, int64_t longest, float* c) {
  for (int64_t col = 0; col < kPanel; col += kBlockCols)
    for (int64_t k = 0; k < depth; k += longest) {
      FloatVec sums[rows][kBlockVecs] = {};
      multiply_add<Lane>({a.data + k * a.depth_stride, a.row_stride, a.depth_stride}, b + k * kPanel + col,
                         smaller(longest, depth - k), sums);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < kBlockVecs; ++j) {
          float* to = c + i * kPanel + col + j * kLanes;
          FloatVec before{};
          if (k > 0) load(to, before);
          store(to, before + sums[i][j]);
        }
    }
}

// Calls body(Count<n>{}) for the run-time n, 1 <= n <= limit.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int limit = kBlockRows, class Body>
MLPKIT_HD void with_count(int64_t n, Body&& body) {
  if constexpr (limit > 1) {
    if (n < limit) return with_count<limit - 1>(n, body);
  }
  body(Count<limit>{});
}

// Calls body(first, rows) for groups of at most `limit` rows, as equal as they can be: a short last group would pay for
// its loads.
template <int limit = kBlockRows, class Body>
MLPKIT_HD void each_group(int64_t rows, Body&& body) {
  const int64_t groups = (rows + limit - 1) / limit;
  for (int64_t i = 0; i < groups; ++i) body(rows * i / groups, rows * (i + 1) / groups - rows * i / groups);
}

// c = a b, group by group; then(first, rows) finishes a group while it is in L1.
template <class Lane, class Then>
MLPKIT_HD void panel_product(const Strided& a, const float* b, int64_t depth, int64_t rows, float* c, Then&& then) {
  each_group(rows, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    const Strided from{a.data + first * a.row_stride, a.row_stride, a.depth_stride};
    with_count(count, [&]<class N>(N) __attribute__((always_inline)) {
      product_of_rows<Lane, N::value>(from, b, depth, longest_sum(rows), c + first * kPanel);
    });
    then(first, count);
  });
}

// Up to 32 rows of a table, from row `first` of a batch on: one after another, or those that an index names.
class TableRows {
 public:
  MLPKIT_HD TableRows(const float* x, int64_t stride, const int32_t* index, int64_t first, int64_t count)
      : count(count), x_(index ? x : x + first * stride), stride_(stride), index_(index ? index + first : nullptr) {}
  MLPKIT_HD const float* row(int64_t i) const { return x_ + (index_ ? index_[i] : i) * stride_; }
  const int64_t count;

 private:
  const float* x_;
  int64_t stride_;
  const int32_t* index_;
};

// The panel [cols, 32] of rows; zeros where the rows end.
inline void panel_of_rows(const TableRows& x, int64_t cols, float* panel) {
  const bool whole = x.count == kPanel;
  for (int64_t col = 0; col < cols; col += kLanes)
    for (int64_t row = 0; row < kPanel; row += kLanes) {
      FloatVec v[kLanes];
      float* to = panel + col * kPanel + row;
      if (whole && col + kLanes <= cols) {
        for (int i = 0; i < kLanes; ++i) load(x.row(row + i) + col, v[i]);
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(to + i * kPanel, v[i]);
        continue;
      }
      for (int i = 0; i < kLanes; ++i)
        v[i] = row + i < x.count ? load_part<FloatVec>(x.row(row + i) + col, cols - col) : FloatVec{};
      transpose(v);
      for (int i = 0; i < smaller(kLanes, cols - col); ++i) store(to + i * kPanel, v[i]);
    }
}

// The inverse: up to 32 rows [rows, cols] of a panel.
inline void rows_of_panel(const float* panel, int64_t rows, int64_t cols, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) to[row * cols + col] = panel[col * kPanel + row];
}

// The blocks of a panel [cols, 32]; zeros where the columns end, up to a multiple of 16.
inline void blocks_of_panel(const float* panel, int64_t cols, float* blocks) {
  for (int64_t col = 0; col < across_of(cols); col += kLanes)
    for (int64_t row = 0; row < kPanel; row += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = col + i < cols ? load_bits<FloatVec>(panel + (col + i) * kPanel + row) : FloatVec{};
      transpose(v);
      float* block = blocks + col / kPanel * kPanel * kPanel + col % kPanel;
      for (int i = 0; i < kLanes; ++i) store(block + (row + i) * kPanel, v[i]);
    }
}

// The blocks of up to 32 rows.
inline void blocks_of_rows(const TableRows& x, int64_t cols, float* blocks) {
  constexpr int64_t ahead = 4;  // rows of a table lie anywhere, so that the hardware cannot guess
  const int64_t width = panels_of(cols) * kPanel;
  for (int64_t row = 0; row < kPanel; ++row) {
    const bool inside = row < x.count;
    const float *from = inside ? x.row(row) : nullptr, *next = x.row(smaller(row + ahead, x.count - 1));
    const auto block = [&](int64_t col) __attribute__((always_inline)) {
      return blocks + col / kPanel * kPanel * kPanel + row * kPanel + col % kPanel;
    };
    int64_t col = 0;
    for (; inside && col + kLanes <= cols; col += kLanes) {
      __builtin_prefetch(next + col);
      store(block(col), load_bits<FloatVec>(from + col));
    }
    for (; col < width; col += kLanes)
      store(block(col), inside && col < cols ? load_part<FloatVec>(from + col, cols - col) : FloatVec{});
  }
}

MLPKIT_END_ISA
