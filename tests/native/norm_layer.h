// One case of norm_act_dropout: a layer with a norm, its numbers, and what x and u are made of (tests).
#pragma once
#include "cpu/norm_act_dropout.h"
#include "layer.h"

namespace native {

using mlpkit::Norm;

struct NormLayer {
  Layer layer;
  Norm norm;
  Dtype compute;
  Numbers z, mean, inverse, weight, bias, slope;

  NormLayer(const Layer& layer, Norm norm, Draw& draw)
      : layer(layer),
        norm(norm),
        compute(compute_type(layer.dtype)),
        z(layer.dtype, layer.elements(), draw),
        mean(compute, moments(), draw),
        inverse(compute, moments(), draw),
        weight(compute, norm != Norm::none && draw.coin() ? layer.region.total_cols : 0, draw),
        bias(compute, norm != Norm::none && draw.coin() ? layer.region.total_cols : 0, draw),
        slope(compute, layer.has_slopes() && draw.coin() ? layer.region.total_cols : 0, draw) {
    z.draw(draw, -4, 4);
    mean.draw(draw, -1, 1);
    inverse.draw(draw, 0.5, 1.5);
    weight.draw(draw, -2, 2);
    bias.draw(draw, -1, 1);
    slope.draw(draw, -0.5, 0.5);
  }

  int64_t moments() const {
    return norm == Norm::none ? 0 : norm == Norm::layer ? layer.total_rows : layer.region.total_cols;
  }
  int64_t moment(int64_t row, int64_t col) const { return norm == Norm::layer ? row : col; }
  static void* or_null(Numbers& numbers) { return numbers.count() ? numbers.data() : nullptr; }
  mlpkit::Normalisation arguments() {
    return {norm, 1e-5, or_null(mean), or_null(inverse), or_null(weight), or_null(bias)};
  }
  // In a chain of roundings, the sum along a row that layer norm takes counts too.
  Real unit() const { return native::unit(layer.dtype) * (kRoundings + (norm == Norm::layer ? layer.region.cols : 0)); }
  Real a(int64_t col) const { return slope.count() ? slope.get(col) : 0.125L; }

  // x = (z - mean) inverse
  Measured x(int64_t element, Real mean, Real inverse) const {
    const Real z_here = z.get(element);
    if (norm == Norm::none) return {z_here, std::fabs(z_here)};
    return {(z_here - mean) * inverse, (std::fabs(z_here) + std::fabs(mean)) * inverse};
  }
  // u = x weight + bias
  Measured u(const Measured& x, int64_t col) const {
    const Real w = weight.count() ? weight.get(col) : 1, b = bias.count() ? bias.get(col) : 0;
    return {x.value * w + b, x.magnitude * std::fabs(w) + std::fabs(b)};
  }
};

// Every layer with every norm that its region allows: layer norm takes whole rows.
template <class Body>
void each_norm_layer(const Body& body) {
  each_layer([&](const Layer& layer) {
    for (const Norm norm : {Norm::none, Norm::batch, Norm::layer})
      if (norm != Norm::layer || layer.region.cols == layer.region.total_cols) body(layer, norm);
  });
}

}  // namespace native
