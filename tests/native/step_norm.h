// A norm between a layer's product and its activation: its memory, and what all panels together decide of a batch norm
// (tests).
#pragma once
#include "step_format.h"

namespace native {

using mlpkit::Norm;

struct NormCase {
  Norm kind = Norm::none;
  bool frozen = false;  // a batch norm whose statistics are given
  bool stops() const { return kind == Norm::batch && !frozen; }
};

struct NetNorm {
  NormCase net;
  int64_t out, rows;
  double eps;
  // Of a batch norm that is not frozen, all but the parameters are NaN until all panels have brought their part.
  Numbers weight, bias, moments, mean, inverse, sums, mean_g, mean_gx;

  NetNorm(NormCase net, int64_t out, int64_t rows, Draw& draw)
      : net(net),
        out(out),
        rows(rows),
        eps(draw.coin() ? 1e-5 : 1e-2),
        weight(Dtype::float32, here() && draw.coin() ? out : 0, draw),
        bias(Dtype::float32, here() && draw.coin() ? out : 0, draw),
        moments(Dtype::float64, net.stops() ? 2 * panels_of(rows) * out : 0, draw),
        mean(Dtype::float32, batch() ? out : 0, draw),
        inverse(Dtype::float32, batch() ? out : 0, draw),
        sums(Dtype::float32, here() ? 2 * panels_of(rows) * out : 0, draw),
        mean_g(Dtype::float32, net.stops() ? out : 0, draw),
        mean_gx(Dtype::float32, net.stops() ? out : 0, draw) {
    weight.draw(draw, -2, 2);
    bias.draw(draw, -1, 1);
    if (!net.frozen) return;
    mean.draw(draw, -1, 1);
    inverse.draw(draw, 0.5, 1.5);
  }

  bool here() const { return net.kind != Norm::none; }
  bool batch() const { return net.kind == Norm::batch; }
  Real weight_of(int64_t col) const { return weight.count() ? weight.get(col) : 1; }
  Real bias_of(int64_t col) const { return bias.count() ? bias.get(col) : 0; }
  int64_t place(int64_t panel, int64_t which, int64_t col) const { return (2 * panel + which) * out + col; }
  int64_t rows_of(int64_t panel) const { return std::min(kPanel, rows - panel * kPanel); }

  template <class T>
  static T* data(Numbers& numbers) {
    return numbers.count() ? static_cast<T*>(numbers.data()) : nullptr;
  }
  mlpkit::StepNorm args() {
    return {net.kind,
            eps,
            data<float>(weight),
            data<float>(bias),
            data<double>(moments),
            data<float>(mean),
            data<float>(inverse),
            data<float>(sums),
            data<float>(mean_g),
            data<float>(mean_gx)};
  }

  void combine_moments() {
    for (int64_t col = 0; col < out; ++col) {
      Real all = 0, squares = 0;
      for (int64_t i = 0; i < panels_of(rows); ++i)
        all += moments.get(place(i, 0, col)) * static_cast<Real>(rows_of(i)) / static_cast<Real>(rows);
      for (int64_t i = 0; i < panels_of(rows); ++i) {
        const Real away = moments.get(place(i, 0, col)) - all;
        squares += moments.get(place(i, 1, col)) + static_cast<Real>(rows_of(i)) * away * away;
      }
      mean.set(col, all);
      inverse.set(col, 1 / std::sqrt(squares / static_cast<Real>(rows) + eps));
    }
  }
  void combine_sums() {
    for (int64_t col = 0; col < out; ++col)
      for (const int64_t which : {0, 1}) {
        Real all = 0;
        for (int64_t i = 0; i < panels_of(rows); ++i) all += sums.get(place(i, which, col));
        (which ? mean_gx : mean_g).set(col, all * weight_of(col) / static_cast<Real>(rows));
      }
  }
};

}  // namespace native
