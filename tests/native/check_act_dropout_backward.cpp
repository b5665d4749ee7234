// act_dropout_backward: dz and the column sums, and that nothing outside the region is touched (tests).
#include "layer.h"

namespace {

using namespace native;

struct Backward {
  Layer layer;
  Dtype compute, dz_dtype;
  bool planes, sums;
  Numbers dy, z, slope, dz, dbias, dslope;
  Plane keep, positive;
  std::vector<Real> before;  // what dbias and dslope hold: the region's sums are added to it

  Backward(const Layer& layer, Draw& draw)
      : layer(layer),
        compute(compute_type(layer.dtype)),
        dz_dtype(layer.dtype == Dtype::bfloat16 && draw.coin() ? Dtype::bfloat16 : compute),
        planes(layer.p > 0 || layer.activation == Activation::relu),
        sums(draw.below(4) > 0),
        dy(layer.dtype, layer.elements(), draw),
        z(layer.dtype, layer.has_z() ? layer.elements() : 0, draw),
        slope(compute, layer.has_slopes() && draw.coin() ? layer.region.total_cols : 0, draw),
        dz(dz_dtype, layer.elements(), draw),
        dbias(compute, layer.region.total_cols, draw),
        dslope(compute, layer.has_slopes() ? layer.region.total_cols : 0, draw),
        keep(planes ? layer.words() : 0, draw),
        positive(layer.activation == Activation::leaky_relu ? layer.words() : 0, draw) {
    dy.draw(draw, -2, 2);
    z.draw(draw, -5, 5);
    slope.draw(draw, -0.5, 0.5);
    dbias.draw(draw, -1, 1);
    dslope.draw(draw, -1, 1);
    for (int64_t col = 0; col < dbias.count(); ++col) before.push_back(dbias.get(col));
    for (int64_t col = 0; col < dslope.count(); ++col) before.push_back(dslope.get(col));
    // Bits outside a ragged tile are random too: they may not matter.
    for (int64_t i = 0; i < layer.words(); ++i) {
      if (planes) keep.data()[i] = static_cast<uint16_t>(draw.bits());
      if (layer.activation == Activation::leaky_relu) positive.data()[i] = static_cast<uint16_t>(draw.bits());
    }
  }

  void run() {
    mlpkit::ActDropoutBackward args{};
    args.region = layer.region;
    args.dtype = layer.dtype;
    args.dz_dtype = dz_dtype;
    args.activation = layer.activation;
    args.dropout = layer.dropout();
    args.negative_slope = 0.125;
    args.dy = dy.data();
    args.z = z.count() ? z.data() : nullptr;
    args.slope = slope.count() ? slope.data() : nullptr;
    args.keep = planes ? keep.data() : nullptr;
    args.positive = layer.activation == Activation::leaky_relu ? positive.data() : nullptr;
    args.dz = dz.data();
    args.dbias = sums ? dbias.data() : nullptr;
    args.dslope = sums && layer.has_slopes() ? dslope.data() : nullptr;
    mlpkit::cpu::act_dropout_backward(args);
  }

  Measured slope_at(int64_t row, int64_t col, int64_t element) const {
    const Real a = slope.count() ? slope.get(col) : 0.125L;
    if (layer.has_z()) return native::slope(layer.activation, z.get(element), a);
    const bool falls = layer.activation == Activation::leaky_relu && !positive.bit(layer.word(row, col), col);
    return {falls ? a : 1, 1};
  }

  void compare(Report& report) const {
    const size_t cols = static_cast<size_t>(layer.region.total_cols);
    std::vector<Measured> bias_sums(cols), slope_sums(cols);
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (!layer.inside(row, col)) return report.that("dz outside the region", element, dz.untouched(element));
      const bool kept = !planes || keep.bit(layer.word(row, col), col);
      const Real scaled = kept ? dy.get(element) * static_cast<Real>(layer.dropout().scale) : 0;
      const Measured at = slope_at(row, col, element);
      const Real exact = scaled * at.value, magnitude = std::fabs(scaled) * at.magnitude;
      const Real half_ulp = dz_dtype == compute ? 0 : ulp(exact, dz_dtype) / 2 * 1.0001L;
      report.near("dz", element, dz.get(element), exact, kRoundings * unit(layer.dtype) * magnitude + half_ulp);
      add(bias_sums[static_cast<size_t>(col)], {exact, magnitude});
      if (!layer.has_slopes()) return;
      const Real term = scaled * std::min<Real>(z.get(element), 0);
      add(slope_sums[static_cast<size_t>(col)], {term, std::fabs(term)});
    });
    compare_sums("dbias", dbias, bias_sums, 0, report);
    if (dslope.count()) compare_sums("dslope", dslope, slope_sums, cols, report);
  }

  static void add(Measured& sum, const Measured& part) {
    sum.value += part.value;
    sum.magnitude += part.magnitude;
  }

  void compare_sums(const char* what, const Numbers& ours, const std::vector<Measured>& exact, size_t first,
                    Report& report) const {
    for (size_t col = 0; col < exact.size(); ++col) {
      const Real start = before[first + col];
      const Real roundings = static_cast<Real>(kRoundings + layer.region.rows);
      const Real bound = roundings * unit(layer.dtype) * (exact[col].magnitude + std::fabs(start));
      const int64_t index = static_cast<int64_t>(col);
      report.near(what, index, ours.get(index), start + (sums ? exact[col].value : 0), sums ? bound : 0);
    }
  }
};

void act_dropout_backward(Report& report) {
  Draw draw(42);
  each_layer([&](const Layer& layer) {
    Backward backward(layer, draw);
    backward.run();
    backward.compare(report);
  });
}

NATIVE_CHECK(act_dropout_backward, act_dropout_backward);

}  // namespace
