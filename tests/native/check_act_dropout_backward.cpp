// act_dropout_backward: dz in both of its forms and the column sums (tests).
#include "layer.h"

namespace {

using namespace native;

struct Backward {
  Layer layer;
  Dtype compute, dz_dtype;
  int64_t stride;
  bool planes, sums;
  Numbers dy, saved, slope, dz, down, dbias, dslope;
  Plane keep, positive;
  std::vector<Real> before;  // what dbias and dslope hold: the region's sums are added to it

  Backward(const Layer& layer, Draw& draw)
      : layer(layer),
        compute(compute_type(layer.dtype)),
        dz_dtype(layer.dtype == Dtype::bfloat16 && draw.coin() ? Dtype::bfloat16 : compute),
        stride(mask_tiles(layer.region.cols) * kMaskTile + draw.of<int64_t>({0, 32})),
        planes(layer.p > 0 || layer.activation == Activation::relu),
        sums(draw.below(4) > 0),
        dy(layer.dtype, layer.elements(), draw),
        saved(layer.saved_dtype(), layer.has_z() ? layer.elements() : 0, draw),
        slope(compute, layer.has_slopes() && draw.coin() ? layer.region.total_cols : 0, draw),
        dz(dz_dtype, layer.region.rows * stride, draw),
        down(Dtype::bfloat16, pairs() ? (layer.region.rows + 1) / 2 * 2 * stride : 0, draw),
        dbias(compute, layer.region.total_cols, draw),
        dslope(compute, layer.has_slopes() ? layer.region.total_cols : 0, draw),
        keep(planes ? layer.words() : 0, draw),
        positive(layer.activation == Activation::leaky_relu ? layer.words() : 0, draw) {
    dy.draw(draw, -2, 2);
    saved.draw(draw, -5, 5);
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

  bool pairs() const { return dz_dtype != compute; }
  // Where dz of an element is, and where its half of a pair along the rows is.
  int64_t place(int64_t row, int64_t col) const { return (row - layer.region.row) * stride + col - layer.region.col; }
  int64_t down_at(int64_t row, int64_t col) const {
    const int64_t line = row - layer.region.row;
    return 2 * (line / 2 * stride + col - layer.region.col) + line % 2;
  }

  void run() {
    mlpkit::ActDropoutBackward args{};
    args.region = layer.region;
    args.dtype = layer.dtype;
    args.activation = layer.activation;
    args.dropout = layer.dropout();
    args.negative_slope = 0.125;
    args.dy = dy.data();
    args.saved = saved.count() ? saved.data() : nullptr;
    args.slope = slope.count() ? slope.data() : nullptr;
    args.keep = planes ? keep.data() : nullptr;
    args.positive = layer.activation == Activation::leaky_relu ? positive.data() : nullptr;
    args.dz = {dz.data(), stride, pairs() ? static_cast<uint32_t*>(down.data()) : nullptr, stride};
    args.dbias = sums ? dbias.data() : nullptr;
    args.dslope = sums && layer.has_slopes() ? dslope.data() : nullptr;
    mlpkit::cpu::act_dropout_backward(args);
  }

  Measured slope_at(int64_t row, int64_t col, int64_t element) const {
    const Real a = slope.count() ? slope.get(col) : 0.125L;
    if (layer.has_slopes()) return native::slope(layer.activation, saved.get(element), a);
    if (layer.has_z()) return {saved.get(element), std::fabs(saved.get(element))};
    const bool falls = layer.activation == Activation::leaky_relu && !positive.bit(layer.word(row, col), col);
    return {falls ? a : 1, 1};
  }

  void compare(Report& report) const {
    const size_t cols = static_cast<size_t>(layer.region.total_cols);
    std::vector<Measured> bias_sums(cols), slope_sums(cols);
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (!layer.inside(row, col)) return;
      const bool kept = !planes || keep.bit(layer.word(row, col), col);
      const Real scaled = kept ? dy.get(element) * static_cast<Real>(layer.dropout().scale) : 0;
      const Measured at = slope_at(row, col, element);
      const Real exact = scaled * at.value, magnitude = std::fabs(scaled) * at.magnitude;
      const Real half_ulp = dz_dtype == compute ? 0 : ulp(exact, dz_dtype) / 2 * 1.0001L;
      report.near("dz", element, dz.get(place(row, col)), exact, kRoundings * unit(layer.dtype) * magnitude + half_ulp);
      if (pairs()) report.that("pairs", element, down.get(down_at(row, col)) == dz.get(place(row, col)));
      add(bias_sums[static_cast<size_t>(col)], {exact, magnitude});
      if (!layer.has_slopes()) return;
      const Real term = scaled * std::min<Real>(saved.get(element), 0);
      add(slope_sums[static_cast<size_t>(col)], {term, std::fabs(term)});
    });
    compare_padding(report);
    compare_sums("dbias", dbias, bias_sums, 0, report);
    if (dslope.count()) compare_sums("dslope", dslope, slope_sums, cols, report);
  }

  // Whole groups of 16 columns are written and the partner of a last odd row is there, all zeros; no more is touched.
  void compare_padding(Report& report) const {
    const Region& region = layer.region;
    for (int64_t row = region.row; row < region.row + region.rows; ++row)
      for (int64_t col = region.col + region.cols; col < region.col + stride; ++col) {
        const bool group = col < region.col + mask_tiles(region.cols) * kMaskTile;
        report.that("dz beyond the columns", col, group ? dz.get(place(row, col)) == 0 : dz.untouched(place(row, col)));
      }
    for (int64_t col = region.col; pairs() && region.rows % 2 && col < region.col + region.cols; ++col)
      report.that("pair of the last row", col, down.get(down_at(region.row + region.rows - 1, col) + 1) == 0);
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
