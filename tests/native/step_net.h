// An MLP, a batch and a loss for step_panel, each array in memory of exactly its size (tests).
#pragma once
#include <cstdlib>
#include <deque>

#include "cpu/mlp_step.h"
#include "step_loss.h"
#include "step_norm.h"

namespace native {

using mlpkit::Activation;

struct NetCase {
  Format format;
  std::vector<int64_t> widths;  // what comes in, then what each layer puts out
  Activation activation;        // of all layers but the last
  double p;
  int64_t rows;
  Loss loss;
  float label_smoothing;
  bool class_weights;
  std::vector<NormCase> norms = {};  // of the first layers; none where it ends
  Real shift = 0;                    // of the biases below a norm that takes it away again

  NormCase norm(size_t index) const { return index < norms.size() ? norms[index] : NormCase{}; }
};

struct NetLayer {
  Format format;
  int64_t in, out, rows;
  Activation activation;
  bool by_column;
  mlpkit::Dropout dropout;
  Numbers forward, backward, bias, slope, inputs, dz, dslope;
  NetNorm norm;

  NetLayer(const NetCase& net, size_t index, Draw& draw)
      : format(net.format),
        in(net.widths[index]),
        out(net.widths[index + 1]),
        rows(net.rows),
        activation(index + 2 < net.widths.size() ? net.activation : Activation::identity),
        by_column(draw.coin()),
        forward(format.memory(out * format.lanes(in), draw)),
        backward(format.memory(format.in_pairs() ? format.lanes(out) * in : 0, draw)),
        bias(Dtype::float32, needs_bias(net, index) || draw.coin() ? out : 0, draw),
        slope(Dtype::float32, is_prelu() ? by_column ? out : 1 : 0, draw),
        inputs(format.memory(panels_of(rows) * panels_of(in) * format.lanes(kPanel) * kPanel, draw)),
        dz(format.memory(panels_of(rows) * out * format.lanes(kPanel), draw)),
        dslope(Dtype::float32, is_prelu() ? panels_of(rows) * out : 0, draw),
        norm(net.norm(index), out, net.rows, draw) {
    // A logarithm is taken of outputs that are positive whatever comes in.
    const Real limit = (needs_bias(net, index) ? 0.2L : 1.7L) / std::sqrt(static_cast<Real>(in));
    draw_weight(draw, limit);
    bias.draw(draw, needs_bias(net, index) ? 2 : -1, needs_bias(net, index) ? 4 : 1);
    for (int64_t i = 0; i < bias.count() && norm.here() && !norm.net.frozen; ++i) bias.set(i, bias.get(i) + net.shift);
    slope.draw(draw, -0.5, 0.5);
    dropout.seed = draw.bits();
    dropout.offset = static_cast<uint32_t>(draw.bits());
    dropout.stream = static_cast<uint32_t>(index);
    dropout.threshold = index + 2 < net.widths.size() ? mlpkit::dropout_threshold(net.p) : 0;
    dropout.scale = mlpkit::dropout_scale(dropout.threshold);
  }

  // A second number that a lane lacks is zero, whatever it is multiplied by.
  void draw_weight(Draw& draw, Real limit) {
    for (int64_t i = 0; i < forward.count(); ++i) forward.set(i, 0);
    for (int64_t i = 0; i < backward.count(); ++i) backward.set(i, 0);
    for (int64_t row = 0; row < out; ++row)
      for (int64_t col = 0; col < in; ++col) {
        const Real weight = rounded(draw.uniform(-limit, limit), format.dtype);
        forward.set(format.forward_index(in, row, col), weight);
        if (backward.count()) backward.set(format.backward_index(in, row, col), weight);
      }
  }

  bool is_prelu() const { return activation == Activation::prelu; }
  static bool needs_bias(const NetCase& net, size_t index) {
    return net.loss == Loss::log_mse && index + 2 == net.widths.size();
  }
  static float* data(Numbers& numbers) { return numbers.count() ? static_cast<float*>(numbers.data()) : nullptr; }

  // The weight is read as it is multiplied alone, and gradients of parameters are the other kernel's: null pointers
  // that are never followed.
  mlpkit::StepLayer args() {
    mlpkit::StepLayer args{};
    args.in = in;
    args.out = out;
    args.activation = activation;
    args.negative_slope = 0.125f;
    args.dropout = dropout;
    args.forward = data(forward);
    args.backward = data(format.in_pairs() ? backward : forward);
    args.bias = data(bias);
    args.slope = data(slope);
    args.slope_by_column = by_column;
    args.norm = norm.args();
    args.inputs = data(inputs);
    args.dz = data(dz);
    args.dslope = data(dslope);
    return args;
  }

  Real weight(int64_t row, int64_t col) const { return forward.get(format.forward_index(in, row, col)); }
  Real input(int64_t row, int64_t col) const { return inputs.get(format.input_index(in, row, col)); }
  Real slope_by_z(int64_t row, int64_t col) const { return dz.get(format.dz_index(out, row, col)); }
  Real slope_of(int64_t col) const { return slope.count() ? slope.get(by_column ? col : 0) : 0.125L; }
  // What a kept output is multiplied by, or 0.
  Real mask(int64_t row, int64_t col) const {
    const int64_t tile = row / mlpkit::kMaskTile * ((out + 15) / 16) + col / mlpkit::kMaskTile;
    const int r = static_cast<int>(row % mlpkit::kMaskTile), c = static_cast<int>(col % mlpkit::kMaskTile);
    const auto words = mlpkit::mask_words(dropout, static_cast<uint64_t>(tile), mlpkit::mask_lane(r, c));
    return mlpkit::mask_bits(words, r, c) >= dropout.threshold ? static_cast<float>(dropout.scale) : 0;
  }
};

// The batch, the targets and the loss. Rows are those of x, or picked from it by an index, last ones first.
struct NetLoss {
  const NetCase& net;
  bool picked;
  Numbers x, target, by_class, weights, by_row;
  Memory classes, index;
  mlpkit::Smoothing smoothing{};
  float scale = 0.0625f * 1.1f, delta = 0.7f;

  NetLoss(const NetCase& net, Draw& draw)
      : net(net),
        picked(draw.coin()),
        x(Dtype::float32, table_rows() * net.widths.front(), draw),
        target(Dtype::float32, entropy() ? 0 : net.rows * outputs(), draw),
        by_class(Dtype::float32, net.class_weights ? outputs() : 0, draw),
        weights(Dtype::float32, entropy() ? padded() : 0, draw),
        by_row(Dtype::float32, draw.coin() ? padded() : 0, draw),
        classes(entropy() ? 4 * padded() : 0, 4, draw),
        index(picked ? 4 * net.rows : 0, 4, draw) {
    x.draw(draw, -2, 2);
    by_row.draw(draw, 0, 3);
    for (int64_t row = 0; row < net.rows && picked; ++row) {
      const int32_t from = static_cast<int32_t>(table_row(row));
      std::memcpy(index.data() + 4 * row, &from, 4);
    }
    target.draw(draw, net.loss == Loss::log_mse ? 0.5L : net.loss == Loss::bce ? 0 : -2, net.loss == Loss::bce ? 1 : 2);
    by_class.draw(draw, 0.5, 1.5);
    if (entropy()) fill_classes(draw);
  }

  bool entropy() const { return mlpkit::of_classes(net.loss); }
  int64_t outputs() const { return net.widths.back(); }
  int64_t padded() const { return panels_of(net.rows) * kPanel; }
  int64_t table_rows() const { return net.rows + (picked ? 3 : 0); }
  int64_t table_row(int64_t row) const { return picked ? table_rows() - 1 - row : row; }
  int64_t x_at(int64_t row, int64_t col) const { return table_row(row) * net.widths.front() + col; }
  Real share_of_row(int64_t row) const { return by_row.count() ? by_row.get(row) : 1; }
  int64_t wanted(int64_t row) const { return load_as<int32_t>(classes.data(), row); }
  Real weight_of_class(int64_t c) const { return by_class.count() ? by_class.get(c) : 1; }

  void fill_classes(Draw& draw) {
    for (int64_t row = 0; row < padded(); ++row) {
      const bool counts = row < net.rows && draw.below(5) != 0;
      const int32_t none = row < net.rows ? mlpkit::kIgnored : mlpkit::kNoRow;
      want(row, counts ? static_cast<int32_t>(draw.below(outputs())) : none);
    }
    Real total = 0;
    for (int64_t c = 0; c < outputs(); ++c) total += weight_of_class(c);
    smoothing.certain = 1 - net.label_smoothing;
    smoothing.spread = net.label_smoothing / static_cast<float>(outputs());
    smoothing.total = static_cast<float>(total);
  }

  void ignore(int64_t row) { want(row, mlpkit::kIgnored); }
  void want(int64_t row, int32_t wanted) {
    std::memcpy(classes.data() + 4 * row, &wanted, 4);
    weights.set(row, wanted >= 0 ? weight_of_class(wanted) : 0);
  }

  mlpkit::StepLoss args() {
    mlpkit::StepLoss args{};
    args.kind = net.loss;
    args.scale = scale;
    args.delta = delta;
    args.smoothing.certain = smoothing.certain;
    args.smoothing.spread = smoothing.spread;
    args.smoothing.total = smoothing.total;
    args.classes = entropy() ? reinterpret_cast<const int32_t*>(classes.data()) : nullptr;
    args.weights = NetLayer::data(weights);
    args.by_class = NetLayer::data(by_class);
    args.target = NetLayer::data(target);
    args.by_row = NetLayer::data(by_row);
    return args;
  }
};

// All NaN before a panel's first segment, and watched at both ends.
class StepScratch {
 public:
  explicit StepScratch(int64_t floats) : bytes_(static_cast<size_t>(floats) * sizeof(float)) {
    if (posix_memalign(&memory_, 64, bytes_) != 0) std::abort();
    std::memset(memory_, 0xff, bytes_);
  }
  ~StepScratch() { std::free(memory_); }
  StepScratch(const StepScratch&) = delete;
  StepScratch& operator=(const StepScratch&) = delete;
  float* data() { return static_cast<float*>(memory_); }

 private:
  size_t bytes_;
  void* memory_ = nullptr;
};

}  // namespace native
