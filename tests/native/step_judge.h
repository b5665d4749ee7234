// A training step panel by panel: what comes into each layer, dz, the sums by prelu's parameter and the loss. Each is
// judged by what the kernel itself stored before it, so that bounds do not grow with depth (tests).
#pragma once
#include "activations.h"
#include "step_net.h"
#include "step_norm_judge.h"

namespace native {

class Step {
 public:
  Step(const NetCase& net, Draw& draw)
      : net_(net),
        loss_(net_, draw),
        values_(Dtype::float64, panels_of(net.rows), draw),
        outputs_(Dtype::float32, draw.coin() ? net.rows * net.widths.back() : 0, draw),
        backwards_(draw.coin()),
        every_segment_(draw.coin()),
        says_until_(draw.coin()) {
    for (size_t i = 0; i + 1 < net.widths.size(); ++i) layers_.emplace_back(net_, i, draw);
  }

  // A batch norm of the batch stops all panels, until all know its moments and again until all know its sums; other
  // stops change nothing.
  void run(void (*kernel)(const mlpkit::StepPanel&)) {
    std::vector<mlpkit::StepLayer> layers;
    for (NetLayer& layer : layers_) layers.push_back(layer.args());
    const int64_t count = static_cast<int64_t>(layers.size());
    std::deque<StepScratch> scratch;
    for (int64_t i = 0; i < panels_of(net_.rows); ++i) scratch.emplace_back(mlpkit::step_scratch(layers.data(), count));
    mlpkit::StepPanel args{};
    args.layers = layers.data();
    args.count = count;
    for (int64_t segment = 0; segment < 2 * count; ++segment) {
      const bool last = segment + 1 == 2 * count, forward = segment < count;
      NetNorm* norm = last ? nullptr : &layers_[static_cast<size_t>(forward ? segment : 2 * count - 2 - segment)].norm;
      if (norm && !norm->net.stops() && !every_segment_) continue;
      args.until = last && !says_until_ ? 0 : segment + 1;
      run_panels(kernel, args, scratch);
      args.from = segment + 1;
      if (norm && norm->net.stops()) forward ? norm->combine_moments() : norm->combine_sums();
    }
  }

  // A row does not count, and its first number is `bad`.
  void ignore(int64_t row, Real bad) {
    loss_.ignore(row);
    loss_.x.set(loss_.x_at(row, 0), bad);
  }
  void compare_ignored(int64_t ignored, Report& report) const {
    for (const NetLayer& layer : layers_)
      for (int64_t row = 0; row < panels_of(net_.rows) * kPanel; ++row)
        for (int64_t col = 0; col < layer.out; ++col) {
          const Real dz = layer.slope_by_z(row, col);
          if (row == ignored)
            report.that("an ignored row that is no number", row, std::isnan(dz));
          else
            report.that("a neighbour of an ignored row", row, row < net_.rows ? std::isfinite(dz) : dz == 0);
        }
    for (int64_t i = 0; i < values_.count(); ++i)
      report.that("loss without an ignored row", i, std::isfinite(values_.get(i)));
  }

  void compare(Report& report) const {
    compare_x(report);
    std::vector<NormJudge> norms;
    for (size_t i = 0; i < layers_.size(); ++i) {
      compare_zeros(layers_[i], i == 0, report);
      norms.emplace_back(layers_[i].norm, preactivations(layers_[i]));
      norms[i].compare_moments(report);
      if (i + 1 < layers_.size()) compare_outputs(layers_[i], norms[i].u(), layers_[i + 1], report);
    }
    compare_last(norms.back().u(), report);
    if (loss_.entropy())
      compare_entropy(norms.back().u(), report);
    else
      compare_loss(norms.back().u(), report);
    for (size_t i = 0; i + 1 < layers_.size(); ++i) compare_backward(layers_[i], norms[i], layers_[i + 1], report);
  }

 private:
  // In either order: a panel that wrote into its neighbour's memory would spoil what is already there.
  void run_panels(void (*kernel)(const mlpkit::StepPanel&), mlpkit::StepPanel args, std::deque<StepScratch>& scratch) {
    const int64_t panels = panels_of(net_.rows);
    for (int64_t i = 0; i < panels; ++i) {
      args.dtype = net_.format.dtype;
      args.rows = net_.rows;
      args.panel = backwards_ ? panels - 1 - i : i;
      args.x = static_cast<const float*>(loss_.x.data());
      args.index = loss_.picked ? reinterpret_cast<const int32_t*>(loss_.index.data()) : nullptr;
      args.outputs = NetLayer::data(outputs_);
      args.loss = loss_.args();
      args.scratch = scratch[static_cast<size_t>(args.panel)].data();
      args.value = static_cast<double*>(values_.data()) + args.panel;
      kernel(args);
    }
  }

  // Of what is rounded as it is stored. Without the rounding it would be within the bound as well.
  void near(const char* what, int64_t index, Real ours, const Bounded& before, Report& report) const {
    const Bounded stored = net_.format.stored(before);
    report.near(what, index, ours, stored.value, stored.error);
    report.that("rounded", index, ours == rounded(ours, net_.format.dtype));
  }
  static const Bounded& at(const Table& table, int64_t cols, int64_t row, int64_t col) {
    return table[static_cast<size_t>(row * cols + col)];
  }

  void compare_x(Report& report) const {
    const NetLayer& first = layers_.front();
    for (int64_t row = 0; row < net_.rows; ++row)
      for (int64_t col = 0; col < first.in; ++col)
        report.near("x", row * first.in + col, first.input(row, col),
                    rounded(loss_.x.get(loss_.x_at(row, col)), net_.format.dtype), 0);
  }

  // The first layer's inputs are zero where rows end, too; in hidden ones an activation has made something of nothing.
  void compare_zeros(const NetLayer& layer, bool first, Report& report) const {
    const int64_t padded = panels_of(net_.rows) * kPanel;
    for (int64_t row = 0; row < (first ? padded : net_.rows); ++row)
      for (int64_t col = row < net_.rows ? layer.in : 0;
           col < (first ? panels_of(layer.in) * kPanel : mlpkit::across_of(layer.in)); ++col)
        report.near("inputs beyond the edge", row, layer.input(row, col), 0, 0);
    for (int64_t row = net_.rows; row < padded; ++row)
      for (int64_t col = 0; col < layer.out; ++col)
        report.near("dz beyond the edge", row, layer.slope_by_z(row, col), 0, 0);
  }

  Table preactivations(const NetLayer& layer) const {
    std::vector<Real> weight, in(static_cast<size_t>(layer.in));
    for (int64_t n = 0; n < layer.out; ++n)
      for (int64_t k = 0; k < layer.in; ++k) weight.push_back(layer.weight(n, k));
    Table z;
    for (int64_t row = 0; row < net_.rows; ++row) {
      for (int64_t k = 0; k < layer.in; ++k) in[static_cast<size_t>(k)] = layer.input(row, k);
      for (int64_t col = 0; col < layer.out; ++col) {
        Real sum = layer.bias.count() ? layer.bias.get(col) : 0, magnitude = std::fabs(sum);
        const Real* line = weight.data() + col * layer.in;
        for (int64_t k = 0; k < layer.in; ++k) {
          const Real term = line[k] * in[static_cast<size_t>(k)];
          sum += term;
          magnitude += std::fabs(term);
        }
        z.push_back({sum, net_.format.sum_error(layer.in, magnitude)});
      }
    }
    return z;
  }

  void compare_outputs(const NetLayer& layer, const Table& table, const NetLayer& next, Report& report) const {
    for (int64_t row = 0; row < net_.rows; ++row)
      for (int64_t col = 0; col < layer.out; ++col) {
        const Bounded z = at(table, layer.out, row, col);
        const Measured y = value(layer.activation, z.value, layer.slope_of(col));
        const Real mask = layer.mask(row, col);
        near("outputs", row * layer.out + col, next.input(row, col),
             {y.value * mask, mask * (1.13L * z.error + kRoundings * kUnit * y.magnitude)}, report);
      }
  }

  void compare_loss(const Table& z, Report& report) const {
    const NetLayer& last = layers_.back();
    std::vector<Bounded> sums(static_cast<size_t>(panels_of(net_.rows)), Bounded{0, 0});
    for (int64_t row = 0; row < net_.rows; ++row)
      for (int64_t col = 0; col < last.out; ++col) {
        const LossAt term =
            loss_at(net_.loss, at(z, last.out, row, col), loss_.target.get(row * last.out + col), loss_.delta);
        add(sums[static_cast<size_t>(row / kPanel)], shared(term.value, row));
        compare_slope(row, col, shared(term.slope, row), report);
      }
    compare_values(sums, report);
  }

  void compare_entropy(const Table& z, Report& report) const {
    const NetLayer& last = layers_.back();
    std::vector<Bounded> sums(static_cast<size_t>(panels_of(net_.rows)), Bounded{0, 0});
    EntropyOfRow entropy{loss_.smoothing, -1, 0, {}, {}};
    for (int64_t c = 0; c < last.out; ++c) entropy.by_class.push_back(loss_.weight_of_class(c));
    for (int64_t row = 0; row < net_.rows; ++row) {
      entropy.wanted = loss_.wanted(row);
      entropy.weight = loss_.weights.get(row);
      entropy.outputs.assign(z.begin() + row * last.out, z.begin() + (row + 1) * last.out);
      const bool brier = net_.loss == Loss::brier;
      add(sums[static_cast<size_t>(row / kPanel)], shared(brier ? entropy.brier() : entropy.value(), row));
      for (int64_t c = 0; c < last.out; ++c)
        compare_slope(row, c, shared(brier ? entropy.brier_slope(c) : entropy.slope(c), row), report);
    }
    compare_values(sums, report);
  }

  // What the last layer puts out, as nobody else has seen it.
  void compare_last(const Table& z, Report& report) const {
    for (int64_t i = 0; i < outputs_.count(); ++i)
      report.near("outputs of the last layer", i, outputs_.get(i), z[static_cast<size_t>(i)].value,
                  z[static_cast<size_t>(i)].error);
  }
  Bounded shared(const Bounded& term, int64_t row) const {
    const Real share = loss_.share_of_row(row);
    return {term.value * share, share * (term.error + 2 * kUnit * std::fabs(term.value))};
  }
  static void add(Bounded& sum, const Bounded& term) {
    sum.value += term.value;
    sum.error += term.error;
  }
  void compare_slope(int64_t row, int64_t col, const Bounded& slope, Report& report) const {
    const NetLayer& last = layers_.back();
    near("slopes of the loss", row * last.out + col, last.slope_by_z(row, col),
         {slope.value * loss_.scale, loss_.scale * (slope.error + 2 * kUnit * std::fabs(slope.value))}, report);
  }
  void compare_values(const std::vector<Bounded>& sums, Report& report) const {
    for (size_t i = 0; i < sums.size(); ++i)
      report.near("loss", static_cast<int64_t>(i), values_.get(static_cast<int64_t>(i)), sums[i].value,
                  sums[i].error + 0x1p-45L * std::fabs(sums[i].value));
  }

  // The slope with its mask. Where z might be of either sign, either side of a kink is right.
  static Bounded masked_slope(const NetLayer& layer, const Bounded& z, Real a, Real mask) {
    const bool relu = layer.activation == Activation::relu;
    const bool kink = layer.activation >= Activation::relu && layer.activation <= Activation::prelu;
    const Measured exact = slope(layer.activation, z.value, a);
    const Real jump = kink && std::fabs(z.value) <= z.error ? 1 + std::fabs(a) : 0;
    const Real by_z = kink || layer.activation == Activation::identity ? 0 : z.error;
    return {mask * (relu ? z.value > 0 : exact.value), mask * (jump + by_z + kRoundings * kUnit * exact.magnitude)};
  }

  // dy = dz of the layer above times its weight.
  Bounded dy(const NetLayer& above, int64_t row, int64_t col) const {
    Real sum = 0, magnitude = 0;
    for (int64_t n = 0; n < above.out; ++n) {
      const Real term = above.slope_by_z(row, n) * above.weight(n, col);
      sum += term;
      magnitude += std::fabs(term);
    }
    return {sum, net_.format.sum_error(above.out, magnitude)};
  }

  void compare_backward(const NetLayer& layer, const NormJudge& norm, const NetLayer& above, Report& report) const {
    std::vector<Bounded> by_slope(static_cast<size_t>(panels_of(net_.rows) * layer.out), Bounded{0, 0});
    Table du;
    for (int64_t row = 0; row < net_.rows; ++row)
      for (int64_t col = 0; col < layer.out; ++col) {
        const Bounded u = at(norm.u(), layer.out, row, col), outer = dy(above, row, col);
        const Real mask = layer.mask(row, col), size = std::fabs(outer.value);
        const Bounded inner = masked_slope(layer, u, layer.slope_of(col), mask);
        const Real error = (size + outer.error) * inner.error + outer.error * std::fabs(inner.value);
        du.push_back({outer.value * inner.value, error});
        const Real below = mask * std::min<Real>(u.value, 0);
        add(by_slope[static_cast<size_t>(row / kPanel * layer.out + col)],
            {outer.value * below, size * mask * u.error - below * (outer.error + 2 * kRoundings * kUnit * size)});
      }
    for (int64_t i = 0; i < layer.dslope.count(); ++i)
      report.near("dslope", i, layer.dslope.get(i), by_slope[static_cast<size_t>(i)].value,
                  by_slope[static_cast<size_t>(i)].error);
    norm.compare_sums(du, report);
    const Table dz = norm.gradients(du);
    for (int64_t row = 0; row < net_.rows; ++row)
      for (int64_t col = 0; col < layer.out; ++col)
        near("dz", row * layer.out + col, layer.slope_by_z(row, col), at(dz, layer.out, row, col), report);
  }

  NetCase net_;
  NetLoss loss_;
  std::deque<NetLayer> layers_;
  Numbers values_, outputs_;
  bool backwards_, every_segment_, says_until_;
};

inline NetCase drawn(Format format, int64_t hidden, Activation activation, double p, int64_t rows, Loss loss,
                     Draw& draw) {
  NetCase net{
      format, {}, activation, p, rows, loss, draw.coin() ? 0.1f : 0.f, draw.coin() && loss == Loss::cross_entropy};
  for (int64_t i = 0; i < hidden + 2; ++i) net.widths.push_back(draw.of<int64_t>({1, 2, 3, 31, 32, 33, 70}));
  return net;
}

inline void check_step(const NetCase& net, void (*kernel)(const mlpkit::StepPanel&), Draw& draw, Report& report) {
  Step step(net, draw);
  step.run(kernel);
  step.compare(report);
}

// Every activation and every loss, with odd and even widths, ragged rows and several panels.
inline void check_steps(Format format, void (*kernel)(const mlpkit::StepPanel&), Draw& draw, Report& report) {
  const std::vector<int64_t> rows = {1, 31, 32, 33, 70};
  const auto loss = [](int64_t i) { return static_cast<Loss>(i); };
  const auto check = [&](const NetCase& net) { check_step(net, kernel, draw, report); };
  for (int activation = 0; activation <= static_cast<int>(Activation::tanh); ++activation)
    for (const double p : {0.0, 0.3, 1.0})
      for (int64_t hidden = 1; hidden <= 3; ++hidden)
        check(drawn(format, hidden, static_cast<Activation>(activation), p, draw.of(rows), loss(draw.below(7)), draw));
  for (int64_t kind = 0; kind < 7; ++kind)
    for (const int64_t count : rows)
      for (int64_t hidden = 0; hidden < 4; ++hidden)
        check(drawn(format, hidden, static_cast<Activation>(draw.below(9)), 0.3, count, loss(kind), draw));
  // Sums longer than one chain, forward and backward, where lines are many and where they are few.
  check({format, {300, 20, 300}, Activation::prelu, 0.3, 33, Loss::cross_entropy, 0.1f, true});
  if (format.in_pairs()) check({format, {517, 33, 515}, Activation::silu, 0, 33, Loss::huber, 0, false});
  check({format, {300, 5, 300}, Activation::relu, 0, 33, Loss::mse, 0, false});
}

}  // namespace native
