// Census: all counts and extremes of a range in one pass over its bit patterns (cpu; compiled once for each
// instruction set).
#include "cpu/census.h"

MLPKIT_BEGIN_ISA
namespace {

// Short enough for 16-bit counters, so that counting needs no wider lanes than the elements have, and for the first
// level cache, where the second look at a block finds it.
constexpr int64_t kBlock = 4096;

// The range of a block's magnitudes. In most blocks it shows that there is nothing else to count.
template <class F>
struct Range {
  using Bits = typename F::Bits;
  Bits bottom, top;  // of all magnitudes
  // Both wrap around: a finite magnitude to the upper half, above any NaN or Inf; zero to the very top.
  Bits largest_less_infinity, smallest_less_one;

  static Range of(const Bits* x, int64_t count) {
    Bits bottom = static_cast<Bits>(~Bits{0}), top = 0, largest = 0, smallest = static_cast<Bits>(~Bits{0});
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = x[i] & F::magnitude;
      bottom = magnitude < bottom ? magnitude : bottom;
      top = magnitude > top ? magnitude : top;
      const Bits less_infinity = static_cast<Bits>(magnitude - F::infinity);
      largest = less_infinity > largest ? less_infinity : largest;
      const Bits less_one = static_cast<Bits>(magnitude - 1);
      smallest = less_one < smallest ? less_one : smallest;
    }
    return {bottom, top, largest, smallest};
  }
  static constexpr Bits lowest_ordinary = F::fp16_min > F::smallest_normal ? F::fp16_min : F::smallest_normal;
  bool ordinary() const { return top <= F::fp16_max && bottom >= lowest_ordinary; }
  // Zeros, as an activation or dropout leaves them, and nothing else to count.
  bool ordinary_but_for_zeros() const {
    return top <= F::fp16_max && (smallest_less_one >= lowest_ordinary - 1 || top == 0);
  }
};

// Counts of one block. Each comparison also counts what lies beyond it on the magnitude's scale. They are locals:
// members could alias the elements, which would keep the loop from being vectorised.
template <class F>
CensusCounts count_block(const typename F::Bits* x, int64_t count) {
  using Bits = typename F::Bits;
  Bits nan = 0, infinite = 0, neginf = 0, zero = 0, up_to_subnormal = 0, above = 0, up_to_below = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = x[i] & F::magnitude;
    nan += magnitude > F::infinity;
    infinite += magnitude == F::infinity;
    neginf += x[i] == static_cast<Bits>(F::infinity | F::sign);
    zero += magnitude == 0;
    up_to_subnormal += magnitude < F::smallest_normal;
    above += magnitude > F::fp16_max;
    up_to_below += magnitude < F::fp16_min;
  }
  CensusCounts counts{};
  counts.nan = nan;
  counts.posinf = infinite - neginf;
  counts.neginf = neginf;
  counts.zero = zero;
  counts.subnormal = up_to_subnormal - zero;
  // float16 itself has no finite number above its maximum.
  if (F::fp16_max < F::infinity - 1) counts.above_fp16_max = above - nan - infinite;
  counts.below_fp16_min = up_to_below - zero;
  return counts;
}

template <class F>
int64_t count_zeros(const typename F::Bits* x, int64_t count) {
  typename F::Bits zero = 0;
  for (int64_t i = 0; i < count; ++i) zero += (x[i] & F::magnitude) == 0;
  return zero;
}

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
  CensusCounts& total = result.counts;
  total.first = -1;
  Bits largest = 0, smallest = static_cast<Bits>(~Bits{0});
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    const int64_t count = args.count - begin < kBlock ? args.count - begin : kBlock;
    const Range<F> range = Range<F>::of(x + begin, count);
    largest = range.largest_less_infinity > largest ? range.largest_less_infinity : largest;
    smallest = range.smallest_less_one < smallest ? range.smallest_less_one : smallest;
    if (range.ordinary_but_for_zeros()) {
      if (!range.ordinary()) total.zero += count_zeros<F>(x + begin, count);
    } else {
      const CensusCounts counts = count_block<F>(x + begin, count);
      total.nan += counts.nan;
      total.posinf += counts.posinf;
      total.neginf += counts.neginf;
      total.zero += counts.zero;
      total.subnormal += counts.subnormal;
      total.above_fp16_max += counts.above_fp16_max;
      total.below_fp16_min += counts.below_fp16_min;
      if (total.first < 0 && range.top >= F::infinity) total.first = begin + first_bad<F>(x + begin);
    }
    if (args.histogram) count_exponents<F>(x + begin, count, result.histogram);
  }
  const Bits absmax = largest & F::sign ? static_cast<Bits>(largest + F::infinity) : Bits{0};
  if (absmax == 0) return;
  result.absmax = value_of<F>(absmax);
  result.min_nonzero = value_of<F>(static_cast<Bits>(smallest + 1));
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
