// A lane's eight elements of a 16x16 mask tile, as the tensor cores leave them: two m16n8 accumulators side by side
// (cuda). Element 2 w + h of them is the one that half h of the lane's word w of the mask contract decides about, and
// bit 2 w + h of the lane's byte in a bit plane is its bit: one Philox call, no shuffle, one byte.
#pragma once
#include <type_traits>

#include "core/activation.h"
#include "core/census.h"
#include "core/dropout_mask.h"
#include "cuda/device.h"

namespace mlpkit::cuda {

constexpr int kFragment = 8;
constexpr uint32_t kAllOfFragment = 0xffu;

// What the elements of a layer have in common. prelu, whose slope belongs to a column, is not among the activations.
struct FragmentOp {
  Activation activation;
  float negative_slope;
  float scale;  // of the dropout
};

struct FragmentBits {  // as in the bit planes of cuda/linear_act_dropout.h; all set where there is no such plane
  uint32_t keep = kAllOfFragment, positive = kAllOfFragment;
};

// Row and column of an element, from those of the fragment's first one.
MLPKIT_HD int fragment_row(int element) { return element >> 1 & 1 ? 8 : 0; }
MLPKIT_HD int fragment_col(int element) { return (element >> 2) * 8 + (element & 1); }

// The keep bits that this lane draws for a tile.
MLPKIT_DEVICE uint32_t draw_fragment(const Dropout& dropout, uint64_t tile, uint32_t lane) {
  const Words words = mask_words(dropout, tile, lane);
  uint32_t keep = 0;
#pragma unroll
  for (int i = 0; i < kFragment; ++i)
    keep |= (mask_bits(words, fragment_row(i), fragment_col(i)) >= dropout.threshold ? 1u : 0u) << i;
  return keep;
}

// What the census says of the elements that were written: the largest magnitude of the finite ones, as a bit pattern of
// T, and whether there are others.
template <class T>
struct FragmentCensus {
  uint32_t largest = 0;
  bool nonfinite = false;

  MLPKIT_DEVICE void add(const uint32_t (&pairs)[kFragment / 2]) {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) {
      const uint32_t magnitude = pairs[i / 2] >> 16 * (i & 1) & Format::magnitude;
      const bool finite = magnitude < Format::infinity;
      largest = finite && magnitude > largest ? magnitude : largest;
      nonfinite = nonfinite || !finite;
    }
  }

 private:
  using Format = std::conditional_t<std::is_same_v<T, Half>, Float16Format, BFloat16Format>;
};

// z becomes y = act(z) * mask * scale. Returns what the backward pass needs to know of each element.
MLPKIT_DEVICE FragmentBits forward_fragment(const FragmentOp& op, uint32_t keep, float (&z)[kFragment]) {
  uint32_t dead = 0, positive = 0;  // z <= 0 and z > 0: neither holds for NaN
  if (op.activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) dead |= (z[i] <= 0 ? 1u : 0u) << i;
  }
  if (op.activation == Activation::leaky_relu) {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) positive |= (z[i] > 0 ? 1u : 0u) << i;
  }
  visit_activation(op.activation, [&](auto formula) {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) z[i] = decltype(formula)::value(z[i], op.negative_slope);
  });
#pragma unroll
  for (int i = 0; i < kFragment; ++i) z[i] *= keep >> i & 1 ? op.scale : 0.f;
  return {keep & ~dead, positive};
}

// d, the gradient by y, becomes that by z: d * mask * scale * act'(z). z is read only where the slope depends on it.
MLPKIT_DEVICE void backward_fragment(const FragmentOp& op, const FragmentBits& bits, const float (&z)[kFragment],
                                     float (&d)[kFragment]) {
  visit_activation(op.activation, [&](auto formula) {
    using A = decltype(formula);
#pragma unroll
    for (int i = 0; i < kFragment; ++i) {
      const float of_mask = bits.keep >> i & 1 ? op.scale : 0.f;
      if constexpr (A::needs == Needs::preactivation)
        d[i] *= of_mask * A::slope(z[i], op.negative_slope);
      else
        d[i] *= of_mask * A::slope(bits.positive >> i & 1 ? 1.f : -1.f, op.negative_slope);
    }
  });
}

}  // namespace mlpkit::cuda
