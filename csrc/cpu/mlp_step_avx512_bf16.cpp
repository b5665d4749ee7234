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
MLPKIT_HD FloatVec neighbours_of(const float* from, int64_t numbers) {
  const FloatVec first = load_part<FloatVec>(from, numbers);
  return neighbours(first, numbers > kLanes ? load_part<FloatVec>(from + kLanes, numbers - kLanes) : FloatVec{});
}

// Of two times 32 numbers, 16 lanes of one from either: numbers `first` and on.
template <int first>
MLPKIT_HD FloatVec zipped(FloatVec low, FloatVec high) {
  typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
  Halves order;
  for (int i = 0; i < kLanes; ++i) {
    order[2 * i] = static_cast<uint16_t>(first + i);
    order[2 * i + 1] = static_cast<uint16_t>(2 * kLanes + first + i);
  }
  return (FloatVec)__builtin_shuffle((Halves)low, (Halves)high, order);
}
// All 32 lanes, side by side.
MLPKIT_HD void store_zipped(float* to, FloatVec low, FloatVec high) {
  store(to, zipped<0>(low, high));
  store(to + kLanes, zipped<kLanes>(low, high));
}
// The first n of them.
MLPKIT_HD void store_zipped(float* to, FloatVec low, FloatVec high, int64_t n) {
  store_part(to, zipped<0>(low, high), n);
  if (n > kLanes) store_part(to + kLanes, zipped<kLanes>(low, high), n - kLanes);
}

struct Pairs {
  using Lane = Pair;

  static void rows(const TableRows& x, int64_t cols, float* in, float* blocks) {
    const int64_t lanes = lanes_of<Pair>(cols);
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      for (int64_t row = 0; row < kPanel; row += kLanes) {
        float* block = blocks + lane * kPanel + row / 2 * kPanel;
        FloatVec v[kLanes];
        for (int i = 0; i < kLanes; ++i)
          v[i] = row + i < x.count ? neighbours_of(x.row(row + i) + 2 * lane, cols - 2 * lane) : FloatVec{};
        for (int i = 0; i < kLanes; i += 2) store_zipped(block + i / 2 * kPanel, v[i], v[i + 1]);
        transpose(v);
        for (int i = 0; i < smaller(kLanes, lanes - lane); ++i) store(in + (lane + i) * kPanel + row, v[i]);
      }
  }

  static const float* outputs(float* y, int64_t cols, float* in, float* blocks) {
    for (int64_t col = 0; col < panels_of(cols) * kPanel; col += kLanes) {
      FloatVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        v[i] = col + i < cols ? neighbours_of(y + (col + i) * kPanel, kPanel) : FloatVec{};
      for (int i = 0; i < smaller(kLanes, cols - col); i += 2)
        store_zipped(in + (col + i) / 2 * kPanel, v[i], v[i + 1]);
      transpose(v);
      float* block = blocks + col / kPanel * kPanel * kPanel / 2 + col % kPanel;
      for (int i = 0; i < kLanes; ++i) store(block + i * kPanel, v[i]);
    }
    return in;
  }

  static const float* gradients(const float* dz, int64_t cols, float* natural, float* across) {
    for (int64_t col = 0; col < cols; col += 2) {
      const FloatVec first = neighbours_of(dz + col * kPanel, kPanel);
      const FloatVec second = col + 1 < cols ? neighbours_of(dz + (col + 1) * kPanel, kPanel) : FloatVec{};
      store(natural + col * kLanes, first);
      if (col + 1 < cols) store(natural + (col + 1) * kLanes, second);
      store_zipped(across + col / 2 * kPanel, first, second);
    }
    return across;
  }
};

}  // namespace

void step_weights_of_pairs(const StepWeights& w) {
  const int64_t lanes = lanes_of<Pair>(w.in);
  const auto pass = [&](int64_t row, int64_t lane) __attribute__((always_inline)) {
    const int64_t rest = w.in - 2 * lane;
    const float* from = w.weight + row * w.in + 2 * lane;
    float* forward = w.forward + row * lanes + lane;
    const bool both = row + 1 < w.out;
    const FloatVec first = neighbours_of(from, rest), second = both ? neighbours_of(from + w.in, rest) : FloatVec{};
    store_part(forward, first, lanes - lane);
    if (both) store_part(forward + lanes, second, lanes - lane);
    store_zipped(w.backward + row / 2 * w.in + 2 * lane, first, second, rest);
  };
  for (int64_t row = 0; row < w.out; row += 2)
    for (int64_t lane = 0; lane < lanes; lane += kLanes) pass(row, lane);
}

void step_panel_of_pairs(const StepPanel& step) { Pass<Pairs>(step).run(); }

void step_gradient_of_pairs(const StepGradient& g) { gradient_pass<Pair>(g); }

MLPKIT_END_ISA
