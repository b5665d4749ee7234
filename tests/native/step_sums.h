// Gradients of a layer's weight and bias and their squares, and that no other column is touched (tests).
#pragma once
#include "step_format.h"

namespace native {

struct Gradient {
  Format format;
  int64_t in, out, rows;
  Numbers inputs, dz, dweight, dbias, squares;

  Gradient(Format format, int64_t in, int64_t out, int64_t rows, bool bias, Draw& draw)
      : format(format),
        in(in),
        out(out),
        rows(rows),
        inputs(format.memory(panels_of(rows) * panels_of(in) * format.lanes(kPanel) * kPanel, draw)),
        dz(format.memory(panels_of(rows) * out * format.lanes(kPanel), draw)),
        dweight(Dtype::float32, in * out, draw),
        dbias(Dtype::float32, bias ? out : 0, draw),
        squares(Dtype::float64, panels_of(in), draw) {
    // Where rows end, dz is zero and inputs are whatever an activation made of nothing: a number that shares its lane
    // with a row, and NaN in lanes that need not be read.
    const int64_t in_lanes = format.lanes(rows) * format.per_lane;
    for (int64_t row = 0; row < panels_of(rows) * kPanel; ++row) {
      for (int64_t col = 0; row < in_lanes && col < panels_of(in) * kPanel; ++col)
        inputs.set(format.input_index(in, row, col), col < in ? draw.uniform(-2, 2) : 0);
      for (int64_t col = 0; col < out; ++col)
        dz.set(format.dz_index(out, row, col), row < rows ? draw.uniform(-1, 1) : 0);
    }
  }

  // From the last panel of columns to the first one, so that what belongs to the others is seen to be left alone.
  void run(void (*kernel)(const mlpkit::StepGradient&), Report& report) {
    mlpkit::StepLayer layer{};
    layer.in = in;
    layer.out = out;
    layer.dweight = static_cast<float*>(dweight.data());
    layer.dbias = dbias.count() ? static_cast<float*>(dbias.data()) : nullptr;
    layer.inputs = static_cast<float*>(inputs.data());
    layer.dz = static_cast<float*>(dz.data());
    for (int64_t panel = panels_of(in) - 1; panel >= 0; --panel) {
      mlpkit::StepGradient args{};
      args.layer = &layer;
      args.rows = rows;
      args.panel = panel;
      args.squares = static_cast<double*>(squares.data()) + panel;
      kernel(args);
      for (int64_t row = 0; row < out; ++row)
        for (int64_t col = 0; col < panel * kPanel; ++col)
          report.that("columns of another panel", col, dweight.untouched(row * in + col));
      for (int64_t i = 0; i < dbias.count() && panel > 0; ++i)
        report.that("the bias is the first panel's", i, dbias.untouched(i));
    }
  }

  // Exact sums; both operands are taken out of their blocks first.
  void compare(Report& report) const {
    std::vector<std::vector<Real>> x, d;
    for (int64_t col = 0; col < in; ++col)
      x.push_back(column(inputs, [&](int64_t r) { return format.input_index(in, r, col); }));
    for (int64_t col = 0; col < out; ++col)
      d.push_back(column(dz, [&](int64_t r) { return format.dz_index(out, r, col); }));
    const std::vector<Real> ones(static_cast<size_t>(rows), 1);
    for (int64_t n = 0; n < out; ++n) {
      const std::vector<Real>& line = d[static_cast<size_t>(n)];
      for (int64_t k = 0; k < in; ++k)
        compare_sum("dweight", n * in + k, dweight, line, x[static_cast<size_t>(k)], report);
      if (dbias.count()) compare_sum("dbias", n, dbias, line, ones, report);
    }
    for (int64_t panel = 0; panel < panels_of(in); ++panel) compare_squares(panel, report);
  }

  template <class Index>
  std::vector<Real> column(const Numbers& numbers, const Index& index) const {
    std::vector<Real> all;
    for (int64_t row = 0; row < rows; ++row) all.push_back(numbers.get(index(row)));
    return all;
  }

  void compare_sum(const char* what, int64_t index, const Numbers& ours, const std::vector<Real>& a,
                   const std::vector<Real>& b, Report& report) const {
    Real sum = 0, magnitudes = 0;
    for (size_t row = 0; row < a.size(); ++row) {
      const Real term = a[row] * b[row];
      sum += term;
      magnitudes += std::fabs(term);
    }
    report.near(what, index, ours.get(index), sum, format.sum_error(rows, magnitudes));
  }

  // Squares of up to 12 rows in two vectors are added in fp32 before they go on in fp64.
  void compare_squares(int64_t panel, Report& report) const {
    Real sum = 0;
    for (int64_t n = 0; n < out; ++n)
      for (int64_t k = panel * kPanel; k < std::min(in, (panel + 1) * kPanel); ++k)
        sum += dweight.get(n * in + k) * dweight.get(n * in + k);
    for (int64_t n = 0; n < dbias.count() && panel == 0; ++n) sum += dbias.get(n) * dbias.get(n);
    report.near("squares", panel, squares.get(panel), sum, 26 * kUnit * sum);
  }
};

inline void check_gradients(Format format, void (*kernel)(const mlpkit::StepGradient&), Draw& draw, Report& report) {
  const std::vector<int64_t> widths = {1, 3, 15, 16, 31, 33, 70};
  const auto check = [&](int64_t in, int64_t out, int64_t rows, bool bias) {
    Gradient gradient(format, in, out, rows, bias, draw);
    gradient.run(kernel, report);
    gradient.compare(report);
  };
  for (const int64_t in : widths)
    for (const int64_t out : widths)
      for (const int64_t rows : {1, 31, 32, 33, 70}) check(in, out, rows, draw.coin());
  // More rows than one chain sums, in its first panel and further on, with and without few lines.
  for (const int64_t rows : {256, 257, 300, 530})
    for (const int64_t out : {3, 15, 16, 33})
      for (const bool bias : {false, true}) check(draw.of<int64_t>({3, 31, 40}), out, rows, bias);
}

}  // namespace native
