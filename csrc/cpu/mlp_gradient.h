// Weight and bias gradients of an MLP's layer out of its inputs and dz, whatever a lane holds (cpu). Included by the
// mlp_step kernels only.
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

template <class Lane, int rows>
void gradient_of_rows(const StepGradient& g, int64_t first, Squares& squares) {
  constexpr int64_t column = kPanel / Lane::per_lane;
  const StepLayer& layer = *g.layer;
  const int64_t panels = panels_of(g.rows), across = panels_of(layer.in), in_panel = g.panel * kPanel;
  const int64_t longest = longest_sum(smaller(layer.in, layer.out)) / kPanel;
  for (int64_t col = 0; col < kPanel && in_panel + col < layer.in; col += kBlockCols) {
    float* to = layer.dweight + first * layer.in + in_panel + col;
    const int64_t cols = layer.in - in_panel - col;
    FloatVec of_group{};
    for (int64_t chain = 0; chain < panels; chain += longest) {
      FloatVec sums[rows][kBlockVecs] = {};
      for (int64_t p = chain; p < smaller(chain + longest, panels); ++p)
        multiply_add<Lane, rows>({layer.dz + (p * layer.out + first) * column, column, 1},
                                 layer.inputs + (p * across + g.panel) * column * kPanel + col,
                                 lanes_of<Lane>(smaller(kPanel, g.rows - p * kPanel)), sums);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < kBlockVecs; ++j) {
          const int64_t n = cols - j * kLanes;
          if (n <= 0) continue;
          float* at = to + i * layer.in + j * kLanes;
          FloatVec sum = sums[i][j];
          if (chain > 0) sum = load_part<FloatVec>(at, n) + sum;
          store_part(at, sum, n);
          if (chain + longest >= panels) of_group += sum * sum;
        }
    }
    squares.add(of_group);
  }
}

template <class Lane>
double bias_gradient(const StepLayer& layer, int64_t rows) {
  constexpr int64_t column = kPanel / Lane::per_lane;
  const int64_t panels = panels_of(rows), longest = kGemmDepth / kPanel;
  double squares = 0.0;
  for (int64_t n = 0; n < layer.out; ++n) {
    double total = 0.0;
    for (int64_t chain = 0; chain < panels; chain += longest) {
      FloatVec sum{};
      for (int64_t p = chain; p < smaller(chain + longest, panels); ++p)
        for (int64_t row = 0; row < column; row += kLanes)
          sum += Lane::sum_of(load_bits<FloatVec>(layer.dz + (p * layer.out + n) * column + row));
      total += sum_of_lanes(sum);
    }
    layer.dbias[n] = static_cast<float>(total);
    squares += total * total;
  }
  return squares;
}

template <class Lane>
void gradient_pass(const StepGradient& g) {
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
