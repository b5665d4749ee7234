// act_dropout_forward: values, saved slopes and bits, and that nothing outside the region is touched (tests).
#include "layer.h"

namespace {

using namespace native;

struct Forward {
  Layer layer;
  Dtype compute;
  int64_t stride;
  bool save;
  Numbers product, bias, slope, y, saved;
  Plane keep, positive;
  double absmax = 0;

  Forward(const Layer& layer, Draw& draw)
      : layer(layer),
        compute(compute_type(layer.dtype)),
        stride(layer.region.cols + draw.of<int64_t>({0, 3})),
        save(draw.coin()),
        product(compute, (layer.region.rows - 1) * stride + layer.region.cols, draw),
        bias(compute, draw.coin() ? layer.region.total_cols : 0, draw),
        slope(compute, layer.has_slopes() && draw.coin() ? layer.region.total_cols : 0, draw),
        y(layer.dtype, layer.elements(), draw),
        saved(layer.saved_dtype(), save && layer.has_z() ? layer.elements() : 0, draw),
        keep(save ? layer.words() : 0, draw),
        positive(save && layer.activation == Activation::leaky_relu ? layer.words() : 0, draw) {
    product.draw(draw, -4, 4);
    bias.draw(draw, -1, 1);
    slope.draw(draw, -0.5, 0.5);
  }

  static void* or_null(Numbers& numbers) { return numbers.count() ? numbers.data() : nullptr; }

  void run() {
    mlpkit::ActDropoutForward args{};
    args.region = layer.region;
    args.dtype = layer.dtype;
    args.activation = layer.activation;
    args.dropout = layer.dropout();
    args.negative_slope = 0.125;
    args.product = product.data();
    args.product_stride = stride;
    args.bias = or_null(bias);
    args.slope = or_null(slope);
    args.y = y.data();
    args.saved = or_null(saved);
    args.keep = save ? keep.data() : nullptr;
    args.positive = save && layer.activation == Activation::leaky_relu ? positive.data() : nullptr;
    args.absmax = save ? &absmax : nullptr;
    mlpkit::cpu::act_dropout_forward(args);
  }

  void compare(Report& report) const {
    Real largest = 0;
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (save && layer.inside(row, col)) largest = std::max(largest, std::fabs(y.get(element)));
    });
    report.that("absmax", 0, absmax == static_cast<double>(largest));
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (layer.inside(row, col)) return compare_element(row, col, element, report);
      report.that("y outside the region", element, y.untouched(element));
      if (saved.count()) report.that("saved outside the region", element, saved.untouched(element));
      const bool own_word = !layer.inside(row, col / kMaskTile * kMaskTile);
      if (save && own_word) report.that("bits outside the region", element, keep.untouched(layer.word(row, col)));
    });
  }

  void compare_element(int64_t row, int64_t col, int64_t element, Report& report) const {
    const Real part = product.get((row - layer.region.row) * stride + col - layer.region.col);
    const Real added = bias.count() ? bias.get(col) : 0, exact_z = part + added;
    const Real a = slope.count() ? slope.get(col) : 0.125L, magnitude = std::fabs(part) + std::fabs(added);
    const Measured act = value(layer.activation, exact_z, a);
    const bool kept = layer.kept(row, col);
    const Real scale = kept ? static_cast<Real>(layer.dropout().scale) : 0, exact = act.value * scale;
    const Real error = kRoundings * unit(layer.dtype) * (magnitude + act.magnitude);
    report.near("y", element, y.get(element), exact, error * scale + half_ulp(exact, layer.dtype));
    if (saved.count()) compare_saved(element, exact_z, a, magnitude, report);
    if (!save) return;
    const int64_t word = layer.word(row, col);
    // Of these numbers none is 0, and a sum of opposite signs is exact, so the sign of z is no matter of rounding.
    const bool live = layer.activation != Activation::relu || exact_z > 0;
    report.that("keep", element, keep.bit(word, col) == (kept && live));
    if (layer.activation == Activation::leaky_relu)
      report.that("positive", element, positive.bit(word, col) == (exact_z > 0));
  }

  void compare_saved(int64_t element, Real exact_z, Real a, Real magnitude, Report& report) const {
    Measured exact{exact_z, 0};
    if (!layer.has_slopes()) exact = native::slope(layer.activation, exact_z, a);
    const Real error = kRoundings * unit(layer.dtype) * (magnitude + exact.magnitude);
    report.near("saved", element, saved.get(element), exact.value, error + half_ulp(exact.value, layer.saved_dtype()));
  }

  Real half_ulp(Real x, Dtype dtype) const { return layer.dtype == compute ? 0 : ulp(x, dtype) / 2 * 1.0001L; }
};

void act_dropout_forward(Report& report) {
  Draw draw(41);
  each_layer([&](const Layer& layer) {
    Forward forward(layer, draw);
    forward.run();
    forward.compare(report);
  });
}

NATIVE_CHECK(act_dropout_forward, act_dropout_forward);

}  // namespace
