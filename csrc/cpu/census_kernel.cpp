// Census: all counts and extremes of a range in one pass over its bit patterns (cpu; compiled once for each
// instruction set).
#include "cpu/census.h"

MLPKIT_BEGIN_ISA
namespace {

// Short enough for 16-bit counters, so that counting needs no wider lanes than the elements have.
constexpr int64_t kBlock = 4096;

// Counters of one block as the comparisons give them: each holds the ones below it on the magnitude's scale too.
template <class F>
struct Block {
  using Bits = typename F::Bits;
  Bits nan, infinite, neginf, zero, up_to_subnormal, above, up_to_below, highest, lowest;

  // Counts in locals: members could alias the elements, which would keep the loop from being vectorised.
  static Block of(const Bits* x, int64_t count) {
    Bits nan = 0, infinite = 0, neginf = 0, zero = 0, up_to_subnormal = 0, above = 0, up_to_below = 0;
    Bits highest = 0, lowest = static_cast<Bits>(~Bits{0});
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = x[i] & F::magnitude;
      nan += magnitude > F::infinity;
      infinite += magnitude == F::infinity;
      neginf += x[i] == static_cast<Bits>(F::infinity | F::sign);
      zero += magnitude == 0;
      up_to_subnormal += magnitude < F::smallest_normal;
      above += magnitude > F::fp16_max;
      up_to_below += magnitude < F::fp16_min;
      // Both wrap around: a finite number to the upper half, above any NaN or Inf; zero to the very top.
      const Bits less_infinity = static_cast<Bits>(magnitude - F::infinity);
      highest = less_infinity > highest ? less_infinity : highest;
      const Bits less_one = static_cast<Bits>(magnitude - 1);
      lowest = less_one < lowest ? less_one : lowest;
    }
    return {nan, infinite, neginf, zero, up_to_subnormal, above, up_to_below, highest, lowest};
  }
};

template <class F>
int64_t first_bad(const typename F::Bits* x) {
  int64_t i = 0;
  while ((x[i] & F::magnitude) < F::infinity) ++i;
  return i;
}

template <class F>
void count_exponents(const typename F::Bits* x, int64_t count, int64_t* histogram) {
  for (int64_t i = 0; i < count; ++i) {
    const typename F::Bits magnitude = x[i] & F::magnitude;
    if (magnitude != 0 && magnitude < F::infinity) ++histogram[histogram_bin(exponent_of<F>(magnitude))];
  }
}

template <class F>
void run(const Census& args) {
  using Bits = typename F::Bits;
  const Bits* x = static_cast<const Bits*>(args.data);
  CensusResult& result = *args.result;
  result = {};
  CensusCounts& counts = result.counts;
  counts.first = -1;
  Bits highest = 0, lowest = static_cast<Bits>(~Bits{0});
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    const int64_t count = args.count - begin < kBlock ? args.count - begin : kBlock;
    const Block<F> block = Block<F>::of(x + begin, count);
    const int64_t bad = static_cast<int64_t>(block.nan) + block.infinite;
    counts.nan += block.nan;
    counts.posinf += block.infinite - block.neginf;
    counts.neginf += block.neginf;
    counts.zero += block.zero;
    counts.subnormal += block.up_to_subnormal - block.zero;
    counts.above_fp16_max += F::fp16_max < F::infinity - 1 ? block.above - bad : 0;
    counts.below_fp16_min += block.up_to_below - block.zero;
    highest = block.highest > highest ? block.highest : highest;
    lowest = block.lowest < lowest ? block.lowest : lowest;
    if (bad && counts.first < 0) counts.first = begin + first_bad<F>(x + begin);
    if (args.histogram) count_exponents<F>(x + begin, count, result.histogram);
  }
  const Bits largest = highest & F::sign ? static_cast<Bits>(highest + F::infinity) : Bits{0};
  if (largest == 0) return;
  result.absmax = value_of<F>(largest);
  result.min_nonzero = value_of<F>(static_cast<Bits>(lowest + 1));
}

}  // namespace

void census(const Census& args) {
  switch (args.dtype) {
    case Dtype::float64:
      return run<Float64Format>(args);
    case Dtype::float32:
      return run<Float32Format>(args);
    case Dtype::bfloat16:
      return run<BFloat16Format>(args);
    case Dtype::float16:
      return run<Float16Format>(args);
  }
}

MLPKIT_END_ISA
