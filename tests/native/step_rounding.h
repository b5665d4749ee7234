// A layer's weight as the two passes multiply with it: every number rounded to the nearest bfloat16, in its place, and
// zero where a lane has no second one (tests).
#pragma once
#include "step_format.h"

namespace native {

struct Weights {
  Format format;
  int64_t in, out;
  Numbers weight, forward, backward;

  Weights(Format format, int64_t in, int64_t out, Draw& draw)
      : format(format),
        in(in),
        out(out),
        weight(Dtype::float32, in * out, draw),
        forward(format.memory(out * format.lanes(in), draw)),
        backward(format.memory(format.in_pairs() ? format.lanes(out) * in : 0, draw)) {
    // Ties, which go to the even neighbour; what rounds to infinity; subnormals.
    const std::vector<Real> special = {0,        -0.0L, 1 + 0x1p-8L,     -1 - 0x3p-8L, 0x1.fffffep127L, -INFINITY,
                                       INFINITY, NAN,   0x1.feffffp127L, 0x1.7ep-130L, -0x1p-149L,      0x1p-126L};
    for (int64_t i = 0; i < weight.count(); ++i)
      weight.set(
          i, draw.below(4) ? std::ldexp(draw.uniform(-2, 2), static_cast<int>(draw.below(60)) - 30) : draw.of(special));
  }

  void run(void (*kernel)(const mlpkit::StepWeights&)) {
    mlpkit::StepWeights args{};
    args.dtype = format.dtype;
    args.in = in;
    args.out = out;
    args.weight = static_cast<const float*>(weight.data());
    args.forward = static_cast<float*>(forward.data());
    args.backward = format.in_pairs() ? static_cast<float*>(backward.data()) : args.forward;
    kernel(args);
  }

  void compare(Report& report) const {
    const int64_t rows = format.lanes(out) * format.per_lane, cols = format.lanes(in) * format.per_lane;
    for (int64_t row = 0; row < out; ++row)
      for (int64_t col = 0; col < cols; ++col)
        compare_one("forward", row, col, forward.get(format.forward_index(in, row, col)), report);
    for (int64_t row = 0; row < rows && backward.count(); ++row)
      for (int64_t col = 0; col < in; ++col)
        compare_one("backward", row, col, backward.get(format.backward_index(in, row, col)), report);
  }

  // Instructions that round to pairs take subnormals for zero.
  void compare_one(const char* what, int64_t row, int64_t col, Real ours, Report& report) const {
    const Real exact = row < out && col < in ? weight.get(row * in + col) : 0, nearest = rounded(exact, format.dtype);
    const bool flushed = format.in_pairs() && std::fabs(exact) < kLeastNormal && ours == 0;
    report.that(what, row * in + col, ours == nearest || flushed || (std::isnan(exact) && std::isnan(ours)));
  }
};

inline void check_weights(Format format, void (*kernel)(const mlpkit::StepWeights&), Draw& draw, Report& report) {
  const std::vector<int64_t> widths = {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65, 70};
  for (const int64_t in : widths)
    for (const int64_t out : widths) {
      Weights weights(format, in, out, draw);
      weights.run(kernel);
      weights.compare(report);
    }
}

}  // namespace native
