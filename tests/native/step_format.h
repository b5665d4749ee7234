// What the step kernels multiply, where they keep it, and how far a sum of products may be from exact (tests).
#pragma once
#include "cpu/mlp_step.h"
#include "harness.h"

namespace native {

using mlpkit::kPanel;
using mlpkit::panels_of;

constexpr Real kUnit = 0x1p-24L;
constexpr Real kLeastNormal = 0x1p-126L;

struct Bounded {  // a number and how far a kernel's may be from it
  Real value, error;
};

struct Format {
  Dtype dtype;       // of what is multiplied
  int64_t per_lane;  // numbers in 32 bits; one of 16 bits there is a float32 that was rounded

  bool in_pairs() const { return per_lane == 2; }
  int64_t lanes(int64_t numbers) const { return (numbers + per_lane - 1) / per_lane; }
  Numbers memory(int64_t lanes, Draw& draw) const {
    return Numbers(in_pairs() ? Dtype::bfloat16 : Dtype::float32, lanes * per_lane, 4, draw);
  }

  // Where numbers lie. Neighbours along the sum share a lane, the first in its low half: rows of the inputs and of dz,
  // for the gradients of weights; columns that come in, of `forward`; columns that go out, of `backward`.
  int64_t input_index(int64_t in, int64_t row, int64_t col) const {
    const int64_t block = row / kPanel * panels_of(in) + col / kPanel, in_panel = row % kPanel;
    const int64_t lane = (block * lanes(kPanel) + in_panel / per_lane) * kPanel + col % kPanel;
    return lane * per_lane + in_panel % per_lane;
  }
  int64_t dz_index(int64_t out, int64_t row, int64_t col) const {
    return (row / kPanel * out + col) * kPanel + row % kPanel;
  }
  int64_t forward_index(int64_t in, int64_t row, int64_t col) const { return row * lanes(in) * per_lane + col; }
  int64_t backward_index(int64_t in, int64_t row, int64_t col) const {
    return (row / per_lane * in + col) * per_lane + row % per_lane;
  }

  // Blocks of up to 256 lanes are summed in one chain, and where there are few lines shorter ones, of no less than 32
  // terms. A pair is rounded once for each of its terms, to either of the two numbers around the exact one, and
  // whatever is subnormal on the way is taken for zero.
  Real sum_error(int64_t depth, Real magnitude) const {
    const int64_t chain = std::min<int64_t>(depth + per_lane - 1, 256 * per_lane);
    const Real error = static_cast<Real>(chain + depth / 32 + 1) * kUnit * magnitude;
    return in_pairs() ? 2 * error + static_cast<Real>(2 * depth) * kLeastNormal : error;
  }

  // The same as it is stored for a product. Instructions that round to bfloat16 take subnormals for zero.
  Bounded stored(const Bounded& b) const {
    if (dtype == Dtype::float32) return b;
    const Real half_ulp = ulp(std::fabs(b.value) + b.error, dtype) / 2;
    return {b.value, b.error + half_ulp + (in_pairs() ? kLeastNormal : 0)};
  }
};

constexpr Format kFloats{Dtype::float32, 1}, kRounded{Dtype::bfloat16, 1}, kPairs{Dtype::bfloat16, 2};
constexpr Format kHalves{Dtype::float16, 1};

// What a check of pairs begins with: a kernel for one instruction set alone is checked there.
inline bool has_pairs(Report& report) {
  if (mlpkit::cpu::capability() == mlpkit::cpu::Capability::avx512_bf16) return true;
  report.that("only AVX-512 with bf16 has it", 0, true);
  return false;
}

}  // namespace native
