// norm_act_dropout_backward, and norm_backward after it (tests).
#include "norm_layer.h"

namespace {

using namespace native;

struct Sums {
  Numbers numbers;
  std::vector<Real> exact, bound;
  Sums(Dtype dtype, int64_t cols, Draw& draw) : numbers(dtype, cols, draw), bound(static_cast<size_t>(cols)) {
    numbers.draw(draw, -1, 1);
    for (int64_t col = 0; col < cols; ++col) {
      exact.push_back(numbers.get(col));
      bound[static_cast<size_t>(col)] = std::fabs(numbers.get(col)) * 64 * unit(dtype);
    }
  }
  void add(int64_t col, Real value, Real error) {
    exact[static_cast<size_t>(col)] += value;
    bound[static_cast<size_t>(col)] += error;
  }
  void compare(const char* what, Report& report) const {
    for (size_t col = 0; col < exact.size(); ++col) {
      const int64_t index = static_cast<int64_t>(col);
      report.near(what, index, numbers.get(index), exact[col], bound[col]);
    }
  }
};

struct Backward {
  NormLayer given;
  Layer layer;
  bool planes;
  Numbers dy, g;
  Sums dbias, dweight, dslope;
  Plane keep, positive;

  Backward(const Layer& layer, Norm norm, Draw& draw)
      : given(layer, norm, draw),
        layer(layer),
        planes(layer.p > 0 || layer.activation == Activation::relu),
        dy(layer.dtype, layer.elements(), draw),
        g(given.compute, layer.elements(), draw),
        dbias(given.compute, norm == Norm::none ? 0 : layer.region.total_cols, draw),
        dweight(given.compute, norm == Norm::none ? 0 : layer.region.total_cols, draw),
        dslope(given.compute, layer.has_slopes() ? layer.region.total_cols : 0, draw),
        keep(planes ? layer.words() : 0, draw),
        positive(layer.activation == Activation::leaky_relu ? layer.words() : 0, draw) {
    dy.draw(draw, -2, 2);
    for (int64_t i = 0; i < layer.words(); ++i) {
      if (planes) keep.data()[i] = static_cast<uint16_t>(draw.bits());
      if (layer.activation == Activation::leaky_relu) positive.data()[i] = static_cast<uint16_t>(draw.bits());
    }
  }

  void run() {
    mlpkit::NormActDropoutBackward args{};
    args.region = layer.region;
    args.dtype = layer.dtype;
    args.norm = given.arguments();
    args.activation = layer.activation;
    args.dropout = layer.dropout();
    args.negative_slope = 0.125;
    args.slope = NormLayer::or_null(given.slope);
    args.dy = dy.data();
    args.z = given.norm == Norm::none && !layer.has_z() ? nullptr : given.z.data();
    args.keep = planes ? keep.data() : nullptr;
    args.positive = layer.activation == Activation::leaky_relu ? positive.data() : nullptr;
    args.g = g.data();
    args.dbias = NormLayer::or_null(dbias.numbers);
    args.dweight = NormLayer::or_null(dweight.numbers);
    args.dslope = NormLayer::or_null(dslope.numbers);
    mlpkit::cpu::norm_act_dropout_backward(args);
  }

  Measured slope_at(int64_t row, int64_t col, const Measured& u) const {
    if (!layer.has_z()) {
      const bool falls = layer.activation == Activation::leaky_relu && !positive.bit(layer.word(row, col), col);
      return {falls ? given.a(col) : 1, 1};
    }
    // An error of u is one of the slope; where u's sign is a matter of rounding, so is the slope of prelu.
    const Measured at = native::slope(layer.activation, u.value, given.a(col));
    const bool either = layer.has_slopes() && std::fabs(u.value) <= given.unit() * u.magnitude;
    return {at.value, at.magnitude + 2 * u.magnitude + (either ? 2 / given.unit() : 0)};
  }

  void compare(Report& report) {
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (!layer.inside(row, col)) return report.that("g outside the region", element, g.untouched(element));
      const bool has = given.norm != Norm::none;
      const int64_t moment = given.moment(row, col);
      const Measured x = given.x(element, has ? given.mean.get(moment) : 0, has ? given.inverse.get(moment) : 1);
      const Measured u = given.u(x, col), at = slope_at(row, col, u);
      const bool kept = !planes || keep.bit(layer.word(row, col), col);
      const Real scaled = kept ? dy.get(element) * static_cast<Real>(layer.dropout().scale) : 0;
      const Real du = scaled * at.value, error = given.unit() * std::fabs(scaled) * at.magnitude;
      const Real w = given.weight.count() ? given.weight.get(col) : 1;
      report.near("g", element, g.get(element), du * w, error * std::fabs(w));
      const Real rows = static_cast<Real>(layer.region.rows), unit = native::unit(layer.dtype) * rows;
      if (has) dbias.add(col, du, error + unit * std::fabs(du));
      if (has) dweight.add(col, du * x.value, (error + (unit + given.unit()) * std::fabs(du)) * x.magnitude);
      if (layer.has_slopes())
        dslope.add(col, scaled * std::min<Real>(u.value, 0), (unit + given.unit()) * std::fabs(scaled) * u.magnitude);
    });
    dbias.compare("dbias", report);
    dweight.compare("dweight", report);
    dslope.compare("dslope", report);
  }
};

void norm_act_dropout_backward(Report& report) {
  Draw draw(63);
  each_norm_layer([&](const Layer& layer, Norm norm) {
    Backward backward(layer, norm, draw);
    backward.run();
    backward.compare(report);
  });
}

NATIVE_CHECK(norm_act_dropout_backward, norm_act_dropout_backward);

// dz = inverse (g - mean(g) - x mean(g x))
struct NormGradient {
  NormLayer given;
  Layer layer;
  bool means;
  Numbers g, mean_g, mean_gx, dz;

  NormGradient(const Layer& layer, Norm norm, Draw& draw)
      : given(layer, norm, draw),
        layer(layer),
        means(norm == Norm::batch && draw.coin()),
        g(given.compute, layer.elements(), draw),
        mean_g(given.compute, means ? layer.region.total_cols : 0, draw),
        mean_gx(given.compute, means ? layer.region.total_cols : 0, draw),
        dz(layer.dtype, layer.elements(), draw) {
    g.draw(draw, -2, 2);
    mean_g.draw(draw, -1, 1);
    mean_gx.draw(draw, -1, 1);
  }

  Measured x(int64_t row, int64_t col) const {
    const int64_t moment = given.moment(row, col);
    return given.x(row * layer.region.total_cols + col, given.mean.get(moment), given.inverse.get(moment));
  }

  std::pair<Measured, Measured> means_at(int64_t row, int64_t col) const {
    if (given.norm == Norm::batch) {
      if (!means) return {{0, 0}, {0, 0}};
      return {{mean_g.get(col), std::fabs(mean_g.get(col))}, {mean_gx.get(col), std::fabs(mean_gx.get(col))}};
    }
    Measured first{0, 0}, second{0, 0};
    const int64_t cols = layer.region.cols;
    for (int64_t i = 0; i < cols; ++i) {
      const Real part = g.get(row * cols + i) / static_cast<Real>(cols);
      const Measured at = x(row, i);
      first = {first.value + part, first.magnitude + std::fabs(part)};
      second = {second.value + part * at.value, second.magnitude + std::fabs(part) * at.magnitude};
    }
    return {first, second};
  }

  void run_and_compare(Report& report) {
    mlpkit::cpu::norm_backward({layer.region, layer.dtype, given.arguments(), given.z.data(), g.data(),
                                NormLayer::or_null(mean_g), NormLayer::or_null(mean_gx), dz.data()});
    layer.each([&](int64_t row, int64_t col, int64_t element) {
      if (!layer.inside(row, col)) return report.that("dz outside the region", element, dz.untouched(element));
      const auto [first, second] = means_at(row, col);
      const Measured at = x(row, col);
      const Real inverse = given.inverse.get(given.moment(row, col)), here = g.get(element);
      const Real exact = inverse * (here - first.value - at.value * second.value);
      const Real magnitude = inverse * (std::fabs(here) + first.magnitude + at.magnitude * second.magnitude);
      const Real half_ulp = layer.dtype == given.compute ? 0 : ulp(exact, layer.dtype) / 2 * 1.0001L;
      report.near("dz", element, dz.get(element), exact, given.unit() * magnitude + half_ulp);
    });
  }
};

void norm_backward(Report& report) {
  Draw draw(64);
  each_norm_layer([&](const Layer& layer, Norm norm) {
    if (norm == Norm::none || layer.activation != Activation::identity) return;  // which has no part in it
    NormGradient gradient(layer, norm, draw);
    gradient.run_and_compare(report);
  });
}

NATIVE_CHECK(norm_backward, norm_backward);

}  // namespace
