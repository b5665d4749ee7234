// column_moments and norm_act_dropout_forward (tests).
#include "norm_layer.h"

namespace {

using namespace native;

void compare_moments(const Layer& layer, const Numbers& z, const Numbers& mean, const Numbers& squares,
                     Report& report) {
  const mlpkit::Region& region = layer.region;
  for (int64_t col = 0; col < region.total_cols; ++col) {
    if (!layer.inside(region.row, col)) {
      report.that("moments outside the region", col, mean.untouched(col) && squares.untouched(col));
      continue;
    }
    const Real rows = static_cast<Real>(region.rows), unit = native::unit(layer.dtype) * (2 * rows + kRoundings);
    Real sum = 0, magnitudes = 0, deviations = 0;
    for (int64_t row = region.row; row < region.row + region.rows; ++row) {
      sum += z.get(row * region.total_cols + col);
      magnitudes += std::fabs(z.get(row * region.total_cols + col));
    }
    for (int64_t row = region.row; row < region.row + region.rows; ++row)
      deviations += std::pow(z.get(row * region.total_cols + col) - sum / rows, 2);
    report.near("mean", col, mean.get(col), sum / rows, unit * magnitudes / rows);
    report.near("squares", col, squares.get(col), deviations, unit * deviations);
  }
}

void column_moments(Report& report) {
  Draw draw(61);
  each_layer([&](const Layer& layer) {
    if (layer.activation != Activation::identity || layer.p > 0) return;  // which have no part in it
    Numbers z(layer.dtype, layer.elements(), draw);
    z.draw(draw, -4, 4);
    Numbers mean(Dtype::float64, layer.region.total_cols, draw), squares(Dtype::float64, layer.region.total_cols, draw);
    mlpkit::cpu::column_moments(
        {layer.region, layer.dtype, z.data(), static_cast<double*>(mean.data()), static_cast<double*>(squares.data())});
    compare_moments(layer, z, mean, squares, report);
  });
}

NATIVE_CHECK(column_moments, column_moments);

struct Forward {
  NormLayer given;
  Layer layer;
  Numbers y;
  Plane keep, positive;

  Forward(const Layer& layer, Norm norm, Draw& draw)
      : given(layer, norm, draw),
        layer(layer),
        y(layer.dtype, layer.elements(), draw),
        keep(layer.words(), draw),
        positive(layer.words(), draw) {}

  void run() {
    mlpkit::NormActDropoutForward args{};
    args.region = layer.region;
    args.dtype = layer.dtype;
    args.norm = given.arguments();
    args.activation = layer.activation;
    args.dropout = layer.dropout();
    args.negative_slope = 0.125;
    args.slope = NormLayer::or_null(given.slope);
    args.z = given.z.data();
    args.y = y.data();
    args.keep = keep.data();
    args.positive = layer.activation == Activation::leaky_relu ? positive.data() : nullptr;
    mlpkit::cpu::norm_act_dropout_forward(args);
  }

  // Of a row: what layer norm writes; of a column or none: what was given.
  std::pair<Real, Real> moments(int64_t row, int64_t col) const {
    if (given.norm == Norm::none) return {0, 1};
    if (given.norm == Norm::batch) return {given.mean.get(col), given.inverse.get(col)};
    const int64_t cols = layer.region.cols;
    Real sum = 0, squares = 0;
    for (int64_t i = 0; i < cols; ++i) sum += given.z.get(row * cols + i);
    const Real mean = sum / static_cast<Real>(cols);
    for (int64_t i = 0; i < cols; ++i) squares += std::pow(given.z.get(row * cols + i) - mean, 2);
    return {mean, 1 / std::sqrt(squares / static_cast<Real>(cols) + 1e-5L)};
  }

  void compare(Report& report) const {
    std::pair<Real, Real> moments;
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (!layer.inside(row, col)) return report.that("y outside the region", element, y.untouched(element));
      if (given.norm != Norm::layer || col == 0) moments = this->moments(row, col);
      if (given.norm == Norm::layer && col == 0) {
        // Every z lies within 4.
        report.near("mean", row, given.mean.get(row), moments.first, given.unit() * 4);
        report.near("inverse", row, given.inverse.get(row), moments.second, given.unit() * moments.second);
      }
      compare_element(row, col, element, given.x(element, moments.first, moments.second), report);
    });
  }

  void compare_element(int64_t row, int64_t col, int64_t element, const Measured& x, Report& report) const {
    const Measured u = given.u(x, col), act = value(layer.activation, u.value, given.a(col));
    const bool kept = layer.kept(row, col);
    const Real scale = kept ? static_cast<Real>(layer.dropout().scale) : 0, exact = act.value * scale;
    const Real half_ulp = layer.dtype == given.compute ? 0 : ulp(exact, layer.dtype) / 2 * 1.0001L;
    report.near("y", element, y.get(element), exact,
                given.unit() * (2 * u.magnitude + act.magnitude) * scale + half_ulp);
    if (std::fabs(u.value) <= given.unit() * u.magnitude) return;  // its sign is a matter of rounding
    const int64_t word = layer.word(row, col);
    const bool live = layer.activation != Activation::relu || u.value > 0;
    report.that("keep", element, keep.bit(word, col) == (kept && live));
    if (layer.activation == Activation::leaky_relu)
      report.that("positive", element, positive.bit(word, col) == (u.value > 0));
  }
};

void norm_act_dropout_forward(Report& report) {
  Draw draw(62);
  each_norm_layer([&](const Layer& layer, Norm norm) {
    Forward forward(layer, norm, draw);
    forward.run();
    forward.compare(report);
  });
}

NATIVE_CHECK(norm_act_dropout_forward, norm_act_dropout_forward);

}  // namespace
