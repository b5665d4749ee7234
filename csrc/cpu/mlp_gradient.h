// Weight and bias gradients of an MLP's layer out of its inputs and dz, whatever a lane holds (cpu). Included by the
// mlp_step kernels only.
#pragma once
#include "cpu/mlp_in_place.h"

MLPKIT_BEGIN_ISA

// `vecs` vectors of columns, from column `col` of the panel on, `cols` of which are there.
template <class Lane, int rows, int vecs>
MLPKIT_HD void gradient_of_columns(const StepGradient& g, int64_t first, int64_t col, int64_t cols, Squares& squares) {
  constexpr int64_t column = kPanel / Lane::per_lane;
  const StepLayer& layer = *g.layer;
  const int64_t panels = panels_of(g.rows), across = panels_of(layer.in);
  const int64_t longest = longest_sum(smaller(layer.in, layer.out)) / kPanel;
  float* to = layer.dweight + first * layer.in + g.panel * kPanel + col;
  FloatVec of_group[4] = {};
  for (int64_t chain = 0; chain < panels; chain += longest) {
    FloatVec sums[rows][vecs] = {};
    for (int64_t p = chain; p < smaller(chain + longest, panels); ++p)
      multiply_add<Lane>({layer.dz + (p * layer.out + first) * column, column, 1},
                         layer.inputs + (p * across + g.panel) * column * kPanel + col,
                         lanes_of<Lane>(smaller(kPanel, g.rows - p * kPanel)), sums);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vecs; ++j) {
        const int64_t n = cols - j * kLanes;
        if (n <= 0) continue;
        float* at = to + i * layer.in + j * kLanes;
        FloatVec sum = sums[i][j];
        if (chain > 0) sum = load_part<FloatVec>(at, n) + sum;
        store_part(at, sum, n);
        if (chain + longest >= panels) of_group[i % 4] += sum * sum;
      }
  }
  squares.add((of_group[0] + of_group[1]) + (of_group[2] + of_group[3]));
}

template <class Lane, int rows>
void gradient_of_rows(const StepGradient& g, int64_t first, Squares& squares) {
  const int64_t cols = smaller(kPanel, g.layer->in - g.panel * kPanel);
  for (int64_t col = 0; col < cols; col += kBlockCols) {
    if (cols - col > kBlockCols - kLanes)
      gradient_of_columns<Lane, rows, kBlockVecs>(g, first, col, cols - col, squares);
    else
      gradient_of_columns<Lane, rows, 1>(g, first, col, cols - col, squares);
  }
}

// The sums of kLanes columns at a time: a transposition makes one addition of all their last ones.
template <class Lane>
double bias_gradient(const StepLayer& layer, int64_t rows) {
  constexpr int64_t column = kPanel / Lane::per_lane;
  const int64_t panels = panels_of(rows), longest = kGemmDepth / kPanel;
  double squares = 0.0;
  for (int64_t first = 0; first < layer.out; first += kLanes) {
    const int64_t here = smaller(kLanes, layer.out - first);
    double total[kLanes] = {};
    for (int64_t chain = 0; chain < panels; chain += longest) {
      FloatVec sums[kLanes] = {};
      for (int64_t i = 0; i < here; ++i)
        for (int64_t p = chain; p < smaller(chain + longest, panels); ++p)
          for (int64_t row = 0; row < column; row += kLanes)
            sums[i] += Lane::sum_of(load_bits<FloatVec>(layer.dz + (p * layer.out + first + i) * column + row));
      transpose(sums);
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
      for (int i = 0; i < kLanes; ++i) total[i] += sums[0][i];
    }
    for (int64_t i = 0; i < here; ++i) {
      layer.dbias[first + i] = static_cast<float>(total[i]);
      squares += total[i] * total[i];
    }
  }
  return squares;
}

template <class Lane>
void gradient_pass(const StepGradient& g) {
  if (g.layer->in_place) return gradient_in_place(g);
  const StepLayer& layer = *g.layer;
  Squares squares;
  each_group(layer.out, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    with_count(count,
               [&]<class N>(N) __attribute__((always_inline)) { gradient_of_rows<Lane, N::value>(g, first, squares); });
  });
  *g.squares = squares.total();
  if (g.panel == 0 && layer.dbias) *g.squares += bias_gradient<Lane>(layer, g.rows);
}

MLPKIT_END_ISA
