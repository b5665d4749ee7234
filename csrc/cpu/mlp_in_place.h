// The first layer of an MLP with few outputs: outputs lie in the lanes, so that rows are read where they lie in their
// table, number by number, and neither copied nor transposed (cpu). Included by the mlp_step kernels only.
#pragma once
#include "cpu/mlp_step.h"
#include "cpu/panel.h"

MLPKIT_BEGIN_ISA

struct Squares {  // in fp64, one for each lane; short sums before it are in fp32
  double of_lane[kLanes] = {};
  MLPKIT_HD void add(FloatVec v) {
    for (int i = 0; i < kLanes; ++i) of_lane[i] += v[i];
  }
  MLPKIT_HD double total() const {
    double sum = 0.0;
    for (double lane : of_lane) sum += lane;
    return sum;
  }
};

constexpr int kTableRows = kLanes == 16 ? 8 : 4;  // at a time: a pointer each

// z[i] = x[i] w for a few rows; w: [depth, across], z: [rows, across], `vecs` vectors of them.
template <int rows, int vecs>
void product_of_table_rows(const float* const* x, const float* w, int64_t across, int64_t depth, int64_t longest,
                           float* z) {
  for (int64_t begin = 0; begin < depth; begin += longest) {
    FloatVec sums[rows][vecs] = {};
    for (int64_t k = begin; k < smaller(begin + longest, depth); ++k) {
      FloatVec v[vecs];
      for (int j = 0; j < vecs; ++j) load(w + k * across + j * kLanes, v[j]);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const FloatVec broadcast = repeat(x[i] + k);
        for (int j = 0; j < vecs; ++j) sums[i][j] = OneInALane::multiply_add(broadcast, v[j], sums[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vecs; ++j) {
        float* to = z + i * across + j * kLanes;
        store(to, begin > 0 ? load_bits<FloatVec>(to) + sums[i][j] : sums[i][j]);
      }
  }
}

// Calls body(column, Count<vectors>{}) for columns from 0 on that are multiples of 16.
template <class Body>
MLPKIT_HD void each_columns(int64_t across, Body&& body) {
  for (int64_t col = 0; col < across; col += kBlockCols) {
    if (across - col >= kBlockCols)
      body(col, Count<kBlockVecs>{});
    else
      body(col, Count<1>{});
  }
}

// The panel y [out, 32] = x w of up to 32 rows, zeros where they end; work: [32, across].
inline void product_in_place(const StepLayer& layer, const TableRows& x, float* work, float* y) {
  const int64_t across = across_of(layer.out);
  for (int64_t row = 0; row < x.count; row += kTableRows) {
    const float* from[kTableRows];
    for (int64_t i = 0; i < kTableRows; ++i) {
      from[i] = x.row(smaller(row + i, x.count - 1));
      const float* next = x.row(smaller(row + i + kTableRows, x.count - 1));
      __builtin_prefetch(next);  // rows of a table lie anywhere; what follows the first lines the hardware guesses
      __builtin_prefetch(next + 16);
    }
    each_columns(across, [&]<class N>(int64_t col, N) __attribute__((always_inline)) {
      product_of_table_rows<kTableRows, N::value>(from, layer.weight + col, across, layer.in, longest_sum(layer.out),
                                                  work + row * across + col);
    });
  }
  panel_of_rows(TableRows(work, across, nullptr, 0, x.count), layer.out, y);
}

// The rows [32, across] of a panel [cols, 32]; zeros where the columns end.
inline void rows_across(const float* panel, int64_t cols, float* rows) {
  const int64_t across = across_of(cols);
  for (int64_t col = 0; col < across; col += kLanes)
    for (int64_t row = 0; row < kPanel; row += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = col + i < cols ? load_bits<FloatVec>(panel + (col + i) * kPanel + row) : FloatVec{};
      transpose(v);
      for (int i = 0; i < kLanes; ++i) store(rows + (row + i) * across + col, v[i]);
    }
}

// Rows first to first + count of the weight's gradient [in, across], `vecs` vectors of them.
template <int count, int vecs>
void gradient_of_table_rows(const StepGradient& g, const TableRows& x, int64_t first, int64_t col, Squares& squares) {
  const StepLayer& layer = *g.layer;
  const int64_t across = across_of(layer.out), longest = longest_sum(layer.out);
  float* to = layer.dweight + first * across + col;
  FloatVec of_group[4] = {};
  for (int64_t begin = 0; begin < g.rows; begin += longest) {
    FloatVec sums[count][vecs] = {};
    for (int64_t row = begin; row < smaller(begin + longest, g.rows); ++row) {
      const float* from = x.row(row) + first;
      FloatVec v[vecs];
      for (int j = 0; j < vecs; ++j) load(layer.dz + row * across + col + j * kLanes, v[j]);
#pragma GCC unroll 16
      for (int i = 0; i < count; ++i) {
        const FloatVec broadcast = repeat(from + i);
        for (int j = 0; j < vecs; ++j) sums[i][j] = OneInALane::multiply_add(broadcast, v[j], sums[i][j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < vecs; ++j) {
        float* at = to + i * across + j * kLanes;
        const FloatVec sum = begin > 0 ? load_bits<FloatVec>(at) + sums[i][j] : sums[i][j];
        store(at, sum);
        if (begin + longest >= g.rows) of_group[i % 4] += sum * sum;
      }
  }
  squares.add((of_group[0] + of_group[1]) + (of_group[2] + of_group[3]));
}

// The sums over rows of dz [rows, across], 32 of them in fp32 and those in fp64; returns the sum of their squares.
inline double bias_gradient_in_place(const StepLayer& layer, int64_t rows) {
  constexpr int64_t chains = 4;
  const int64_t across = across_of(layer.out);
  double squares = 0.0;
  for (int64_t col = 0; col < across; col += kLanes) {
    double total[kLanes] = {};
    for (int64_t panel = 0; panel < panels_of(rows); ++panel) {
      FloatVec sums[chains] = {};
      for (int64_t row = 0; row < kPanel; row += chains)
        for (int64_t i = 0; i < chains; ++i)
          sums[i] += load_bits<FloatVec>(layer.dz + (panel * kPanel + row + i) * across + col);
      const FloatVec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int i = 0; i < kLanes; ++i) total[i] += sum[i];
    }
    for (int64_t i = 0; i < smaller(kLanes, layer.out - col); ++i) {
      layer.dbias[col + i] = static_cast<float>(total[i]);
      squares += total[i] * total[i];
    }
  }
  return squares;
}

inline void gradient_in_place(const StepGradient& g) {
  const StepLayer& layer = *g.layer;
  const TableRows x(g.x, layer.in, g.index, 0, g.rows);
  Squares squares;
  each_columns(across_of(layer.out), [&]<class N>(int64_t col, N) __attribute__((always_inline)) {
    // A vector of sums each leaves room for as many columns as most tables have multiples of.
    constexpr int limit = N::value == 1 && kLanes == 16 ? 16 : kBlockRows;
    each_group<limit>(layer.in, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      with_count<limit>(count, [&]<class C>(C) __attribute__((always_inline)) {
        gradient_of_table_rows<C::value, N::value>(g, x, first, col, squares);
      });
    });
  });
  *g.squares = squares.total();
  if (layer.dbias) *g.squares += bias_gradient_in_place(layer, g.rows);
}

MLPKIT_END_ISA
