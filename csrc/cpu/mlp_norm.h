// Batch and layer norm of a panel, forward and backward (cpu). Included by the mlp_step kernels only.
#pragma once
#include "cpu/mlp_loss.h"
#include "cpu/mlp_step.h"
#include "cpu/simd.h"

MLPKIT_BEGIN_ISA

struct Kept {                                     // of one layer and panel, [out, 32] each
  float *y, *slopes = nullptr, *below = nullptr;  // outputs; slopes with mask and scale; prelu's by its parameter
  float *x = nullptr, *inverse = nullptr;         // of a norm: normalised; layer: each row's 1 / deviation, [32]
};

// Which of the lanes from `row` on are rows.
MLPKIT_HD IntVec inside(int64_t row, int64_t rows) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(rows - row);
}

// Mean and sum of squared deviations of each output over the panel's rows.
inline void moments_of_panel(const StepLayer& layer, int64_t panel, int64_t rows, const float* z) {
  double* mean = layer.norm.moments + 2 * panel * layer.out;
  for (int64_t n = 0; n < layer.out; ++n) {
    FloatVec sum{}, squares{};
    for (int64_t row = 0; row < kPanel; row += kLanes)
      sum += inside(row, rows) ? load_bits<FloatVec>(z + n * kPanel + row) : FloatVec{};
    const double exact = sum_of_lanes(sum) / static_cast<double>(rows);
    const float pivot = static_cast<float>(exact);
    FloatVec rest{};  // of the deviations from the rounded mean
    for (int64_t row = 0; row < kPanel; row += kLanes) {
      const FloatVec d = inside(row, rows) ? load_bits<FloatVec>(z + n * kPanel + row) - pivot : FloatVec{};
      rest += d;
      squares += d * d;
    }
    const Moments part = moments_around(pivot, sum_of_lanes(rest), sum_of_lanes(squares), static_cast<double>(rows));
    mean[n] = part.mean;
    mean[layer.out + n] = part.squares;
  }
}

// sum over n of value(n) for each row, in sums of 32 and then the sum of those.
template <class Value>
MLPKIT_HD FloatVec sum_of_columns(int64_t columns, Value&& value) {
  FloatVec sum{};
  for (int64_t start = 0; start < columns; start += kPanel) {
    FloatVec part{};
    for (int64_t n = start; n < start + kPanel && n < columns; ++n) part += value(n);
    sum += part;
  }
  return sum;
}

// kept.y: z becomes u; kept.x and kept.inverse are written.
inline void normalise(const StepLayer& layer, const Kept& kept) {
  const StepNorm& norm = layer.norm;
  const float columns = static_cast<float>(layer.out);
  for (int64_t row = 0; row < kPanel; row += kLanes) {
    const auto z = [&](int64_t n)
                       __attribute__((always_inline)) { return load_bits<FloatVec>(kept.y + n * kPanel + row); };
    FloatVec mean{}, inverse{};
    if (norm.kind == Norm::layer) {
      mean = sum_of_columns(layer.out, z) / columns;
      const FloatVec variance = sum_of_columns(layer.out,
                                               [&](int64_t n) __attribute__((always_inline)) {
                                                 const FloatVec d = z(n) - mean;
                                                 return d * d;
                                               }) /
                                columns;
      inverse = 1.f / math::sqrt(variance + static_cast<float>(norm.eps));
      store(kept.inverse + row, inverse);
    }
    for (int64_t n = 0; n < layer.out; ++n) {
      if (norm.kind == Norm::batch) {
        mean = FloatVec{} + norm.mean[n];
        inverse = FloatVec{} + norm.inverse[n];
      }
      const FloatVec x = normalised(z(n), mean, inverse);
      store(kept.x + n * kPanel + row, x);
      store(kept.y + n * kPanel + row, scaled_and_shifted(x, FloatVec{} + (norm.weight ? norm.weight[n] : 1.f),
                                                          FloatVec{} + (norm.bias ? norm.bias[n] : 0.f)));
    }
  }
}

// du becomes dz; zeros beyond the rows.
inline void gradients_of_norm(const StepLayer& layer, int64_t rows, const Kept& kept, float* dz) {
  const StepNorm& norm = layer.norm;
  const float columns = static_cast<float>(layer.out);
  for (int64_t row = 0; row < kPanel; row += kLanes) {
    const auto g = [&](int64_t n) __attribute__((always_inline)) {
      return load_bits<FloatVec>(dz + n * kPanel + row) * (norm.weight ? norm.weight[n] : 1.f);
    };
    const auto x = [&](int64_t n)
                       __attribute__((always_inline)) { return load_bits<FloatVec>(kept.x + n * kPanel + row); };
    FloatVec mean_g{}, mean_gx{}, inverse{};
    if (norm.kind == Norm::layer) {
      mean_g = sum_of_columns(layer.out, g) / columns;
      mean_gx =
          sum_of_columns(layer.out, [&](int64_t n) __attribute__((always_inline)) { return g(n) * x(n); }) / columns;
      inverse = load_bits<FloatVec>(kept.inverse + row);
    }
    for (int64_t n = 0; n < layer.out; ++n) {
      if (norm.kind == Norm::batch) {
        inverse = FloatVec{} + norm.inverse[n];
        mean_g = FloatVec{} + (norm.mean_g ? norm.mean_g[n] : 0.f);
        mean_gx = FloatVec{} + (norm.mean_gx ? norm.mean_gx[n] : 0.f);
      }
      const FloatVec d = norm_gradient(g(n), x(n), inverse, mean_g, mean_gx);
      store(dz + n * kPanel + row, inside(row, rows) ? d : FloatVec{});
    }
  }
}

MLPKIT_END_ISA
