// A first layer that reads its rows where they lie, against the same layer the other way, which other checks judge
// (tests). Every array has exactly its size.
#include <vector>

#include "cpu/mlp_step.h"
#include "harness.h"

namespace {

using namespace native;
using mlpkit::across_of;
using mlpkit::kPanel;
using mlpkit::panels_of;

constexpr int64_t kOutputs = 3;
constexpr Real kStep = 0x1p-24L;

struct Case {
  int64_t in, out, rows;
  bool picked;
};

float* floats(Numbers& numbers) { return static_cast<float*>(numbers.data()); }

// in -> out -> 3 with tanh, dropout and the squared error, forward, backward and the gradients of the first layer.
struct TwoLayers {
  bool in_place;
  int64_t in, out, rows, across;
  Numbers weight, bias, dweight, dbias, inputs, dz;
  Numbers above, inputs_above, dz_above;
  double squares = 0;

  TwoLayers(bool in_place, const Case& c, Draw& draw)
      : in_place(in_place),
        in(c.in),
        out(c.out),
        rows(panels_of(c.rows) * kPanel),
        across(in_place ? across_of(c.out) : c.out),
        weight(Dtype::float32, in * across, draw),
        bias(Dtype::float32, out, draw),
        dweight(Dtype::float32, in * across, draw),
        dbias(Dtype::float32, out, draw),
        inputs(Dtype::float32, in_place ? 0 : rows * panels_of(in) * kPanel, draw),
        dz(Dtype::float32, rows * across, draw),
        above(Dtype::float32, kOutputs * out, draw),
        inputs_above(Dtype::float32, rows * panels_of(out) * kPanel, draw),
        dz_above(Dtype::float32, rows * kOutputs, draw) {}

  int64_t at(int64_t col, int64_t unit) const { return in_place ? col * across + unit : unit * in + col; }
  int64_t dz_at(int64_t row, int64_t unit) const {
    return in_place ? row * across + unit : (row / kPanel * out + unit) * kPanel + row % kPanel;
  }

  std::vector<mlpkit::StepLayer> layers() {
    mlpkit::StepLayer first{}, last{};
    first.in = in;
    first.out = last.in = out;
    last.out = kOutputs;
    first.activation = mlpkit::Activation::tanh;
    last.activation = mlpkit::Activation::identity;
    first.dropout = {7, 3, 0, mlpkit::dropout_threshold(0.3), mlpkit::dropout_scale(mlpkit::dropout_threshold(0.3))};
    first.weight = first.forward = first.backward = floats(weight);
    first.bias = floats(bias);
    first.dweight = floats(dweight);
    first.dbias = floats(dbias);
    first.inputs = in_place ? nullptr : floats(inputs);
    first.dz = floats(dz);
    first.in_place = in_place;
    last.weight = last.forward = last.backward = floats(above);
    last.inputs = floats(inputs_above);
    last.dz = floats(dz_above);
    return {first, last};
  }

  void run(const Case& c, Numbers& x, const std::vector<int32_t>& index, Numbers& target, Draw& draw) {
    const std::vector<mlpkit::StepLayer> both = layers();
    Numbers scratch(Dtype::float32, mlpkit::step_scratch(both.data(), 2), 64, draw);
    std::vector<double> values(static_cast<size_t>(panels_of(c.rows)));
    mlpkit::StepPanel panel{};
    panel.dtype = Dtype::float32;
    panel.layers = both.data();
    panel.count = 2;
    panel.rows = c.rows;
    panel.x = floats(x);
    panel.index = c.picked ? index.data() : nullptr;
    panel.loss.kind = mlpkit::Loss::mse;
    panel.loss.scale = 0.1f;
    panel.loss.target = floats(target);
    panel.scratch = floats(scratch);
    for (; panel.panel < panels_of(c.rows); ++panel.panel) {
      panel.value = &values[static_cast<size_t>(panel.panel)];
      mlpkit::cpu::step_panel(panel);
    }
    for (int64_t i = 0; i < (in_place ? 1 : panels_of(in)); ++i) {
      double part = 0;
      mlpkit::cpu::step_gradient({both.data(), c.rows, i, &part, panel.x, panel.index});
      squares += part;
    }
  }
};

void compare(const Case& c, Draw& draw, Report& report) {
  TwoLayers ours(true, c, draw), other(false, c, draw);
  const int64_t table = c.rows + (c.picked ? 5 : 0);
  Numbers x(Dtype::float32, table * c.in, draw), target(Dtype::float32, c.rows * kOutputs, draw);
  x.draw(draw, -2, 2);
  target.draw(draw, -1, 1);
  std::vector<int32_t> index;
  for (int64_t row = 0; row < c.rows; ++row) index.push_back(static_cast<int32_t>(table - 1 - row));
  for (int64_t i = 0; i < ours.weight.count(); ++i) ours.weight.set(i, 0);
  const Real limit = 1 / std::sqrt(static_cast<Real>(c.in));
  for (int64_t unit = 0; unit < c.out; ++unit) {
    for (int64_t col = 0; col < c.in; ++col) {
      const Real w = rounded(draw.uniform(-limit, limit), Dtype::float32);
      ours.weight.set(ours.at(col, unit), w);
      other.weight.set(other.at(col, unit), w);
    }
    const Real b = rounded(draw.uniform(-1, 1), Dtype::float32);
    ours.bias.set(unit, b);
    other.bias.set(unit, b);
  }
  for (int64_t i = 0; i < ours.above.count(); ++i) {
    const Real w = rounded(draw.uniform(-1, 1), Dtype::float32);
    ours.above.set(i, w);
    other.above.set(i, w);
  }
  ours.run(c, x, index, target, draw);
  other.run(c, x, index, target, draw);
  // Sums of as many products of numbers below 2: both ways may err, and what follows passes it on.
  const Real dz = static_cast<Real>(c.in) * kStep, of_rows = 2 * static_cast<Real>(c.rows) * dz;
  for (int64_t row = 0; row < ours.rows; ++row)
    for (int64_t unit = 0; unit < ours.across; ++unit) {
      const Real exact = unit < c.out ? other.dz.get(other.dz_at(row, unit)) : 0;
      report.near("dz", row * ours.across + unit, ours.dz.get(ours.dz_at(row, unit)), exact, unit < c.out ? dz : 0);
    }
  for (int64_t col = 0; col < c.in; ++col)
    for (int64_t unit = 0; unit < ours.across; ++unit) {
      const Real exact = unit < c.out ? other.dweight.get(other.at(col, unit)) : 0;
      report.near("dweight", col * ours.across + unit, ours.dweight.get(ours.at(col, unit)), exact,
                  unit < c.out ? of_rows : 0);
    }
  for (int64_t unit = 0; unit < c.out; ++unit)
    report.near("dbias", unit, ours.dbias.get(unit), other.dbias.get(unit), of_rows);
  report.near("squares", 0, ours.squares, other.squares, 0x1p-12L * other.squares);
}

void step_in_place(Report& report) {
  Draw draw(53);
  for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{{32, 16}, {70, 13}, {64, 30}, {300, 12}})
    for (const int64_t rows : {1, 31, 32, 70, 290})
      for (const bool picked : {false, true}) compare({in, out, rows, picked}, draw, report);
}

NATIVE_CHECK(step_in_place, step_in_place);

}  // namespace
