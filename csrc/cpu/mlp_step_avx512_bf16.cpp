// A training step of an MLP with pairs of bfloat16 in a lane, multiplied by VDPBF16PS at twice the rate of fp32 (cpu;
// AVX-512 with bf16 alone).
#include "cpu/mlp_gradient.h"
#include "cpu/mlp_pass.h"
#include "cpu/mlp_step.h"

MLPKIT_BEGIN_ISA
namespace {

struct Pair {
  static constexpr int64_t per_lane = 2;
  MLPKIT_HD static FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec sum) {
    return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  MLPKIT_HD static FloatVec sum_of(FloatVec lanes) {
    const UintVec bits = (UintVec)lanes;
    return (FloatVec)(bits << 16) + (FloatVec)(bits & 0xffff0000u);
  }
};

// 32 numbers as 16 lanes of neighbours.
MLPKIT_HD FloatVec neighbours(FloatVec first, FloatVec second) {
  return (FloatVec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// 16 lanes, each of one number from either vector.
MLPKIT_HD FloatVec zipped(FloatVec low, FloatVec high) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
  const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
  return (FloatVec)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

MLPKIT_HD FloatVec neighbours_of(const float* from, int64_t numbers) {
  const FloatVec first = load_part<FloatVec>(from, numbers);
  return neighbours(first, numbers > kLanes ? load_part<FloatVec>(from + kLanes, numbers - kLanes) : FloatVec{});
}

// A panel [cols, 32] as pairs of columns, [lanes(cols), 32].
void zip_columns(const float* panel, int64_t cols, float* to) {
  for (int64_t col = 0; col < cols; col += 2)
    for (int64_t row = 0; row < kPanel; row += kLanes) {
      const float* from = panel + col * kPanel + row;
      const FloatVec second = col + 1 < cols ? load_bits<FloatVec>(from + kPanel) : FloatVec{};
      store(to + col / 2 * kPanel + row, zipped(load_bits<FloatVec>(from), second));
    }
}

struct Pairs {
  using Lane = Pair;

  static void rows(const float* x, int64_t stride, int64_t rows, int64_t cols, float* in, float* blocks) {
    const auto row_of = [&](int64_t row, int64_t col) __attribute__((always_inline)) {
      return row < rows && col < cols ? load_part<FloatVec>(x + row * stride + col, cols - col) : FloatVec{};
    };
    for (int64_t row = 0; row < kPanel; row += 2)
      for (int64_t col = 0; col < panels_of(cols) * kPanel; col += kLanes)
        store(blocks + col / kPanel * kPanel * kPanel / 2 + row / 2 * kPanel + col % kPanel,
              zipped(row_of(row, col), row_of(row + 1, col)));
    const int64_t lanes = lanes_of<Pair>(cols);
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      for (int64_t row = 0; row < kPanel; row += kLanes) {
        FloatVec v[kLanes];
        for (int i = 0; i < kLanes; ++i)
          v[i] = row + i < rows ? neighbours_of(x + (row + i) * stride + 2 * lane, cols - 2 * lane) : FloatVec{};
        transpose(v);
        for (int i = 0; i < smaller(kLanes, lanes - lane); ++i) store(in + (lane + i) * kPanel + row, v[i]);
      }
  }

  static const float* outputs(float* y, int64_t cols, float* in, float* blocks) {
    zip_columns(y, cols, in);
    for (int64_t col = 0; col < panels_of(cols) * kPanel; col += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = col + i < cols ? neighbours_of(y + (col + i) * kPanel, kPanel) : FloatVec{};
      transpose(v);
      float* block = blocks + col / kPanel * kPanel * kPanel / 2 + col % kPanel;
      for (int i = 0; i < kLanes; ++i) store(block + i * kPanel, v[i]);
    }
    return in;
  }

  static const float* gradients(const float* dz, int64_t cols, float* natural, float* across) {
    for (int64_t col = 0; col < cols; ++col) store(natural + col * kLanes, neighbours_of(dz + col * kPanel, kPanel));
    zip_columns(dz, cols, across);
    return across;
  }
};

}  // namespace

void step_weights_of_pairs(const StepWeights& w) {
  const int64_t lanes = lanes_of<Pair>(w.in);
  for (int64_t row = 0; row < w.out; ++row)
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      store_part(w.forward + row * lanes + lane, neighbours_of(w.weight + row * w.in + 2 * lane, w.in - 2 * lane),
                 lanes - lane);
  for (int64_t row = 0; row < w.out; row += 2)
    for (int64_t col = 0; col < w.in; col += kLanes) {
      const float* from = w.weight + row * w.in + col;
      const FloatVec second = row + 1 < w.out ? load_part<FloatVec>(from + w.in, w.in - col) : FloatVec{};
      store_part(w.backward + row / 2 * w.in + col, zipped(load_part<FloatVec>(from, w.in - col), second), w.in - col);
    }
}

void step_panel_of_pairs(const StepPanel& step) { Pass<Pairs>(step).run(); }

void step_gradient_of_pairs(const StepGradient& g) { gradient_pass<Pair>(g); }

MLPKIT_END_ISA
