// census against a count of one number after another (tests).
#include "cpu/census.h"
#include "harness.h"

namespace {

using namespace native;
using mlpkit::CensusResult;

// Bits as a number: every pattern of the type may come up, NaN and subnormals often.
void fill(Memory& memory, Dtype dtype, int64_t count, bool ordinary, Draw& draw) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits = draw.bits();
    const int width = 8 * static_cast<int>(size_of(dtype)), mantissa = precision_of(dtype).digits - 1;
    const uint64_t field = ((1ull << (width - 1 - mantissa)) - 1) << mantissa;
    if (ordinary)
      bits = (bits & ~field) | (field >> 1 & field);  // near 1
    else if (const int64_t kind = draw.below(8); kind < 3)
      bits = kind == 0   ? bits & ~field
             : kind == 1 ? bits | field
                         : (bits & (1ull << (width - 1))) | (draw.coin() ? field : 0);
    std::memcpy(memory.data() + i * size_of(dtype), &bits, static_cast<size_t>(size_of(dtype)));
  }
}

void count_one(Real x, int64_t index, Dtype dtype, bool histogram, CensusResult& result) {
  mlpkit::CensusCounts& counts = result.counts;
  if (!std::isfinite(x)) {
    ++(std::isnan(x) ? counts.nan : x > 0 ? counts.posinf : counts.neginf);
    if (counts.first < 0) counts.first = index;
    return;
  }
  const Precision p = precision_of(dtype);
  const Real size = std::fabs(x);
  if (size == 0) {
    ++counts.zero;
    return;
  }
  counts.subnormal += size < std::ldexp(1.0L, p.lowest + p.digits - 1);
  counts.above_fp16_max += size > 65504;
  counts.below_fp16_min += size < 0x1p-14L;
  result.absmax = std::max(result.absmax, static_cast<double>(size));
  if (result.min_nonzero == 0 || size < result.min_nonzero) result.min_nonzero = static_cast<double>(size);
  if (histogram) ++result.histogram[std::min(std::max(std::ilogb(size) + 40, 0), 63)];
}

void compare(const CensusResult& ours, const CensusResult& exact, int64_t count, Report& report) {
  const auto same = [&](const char* what, auto a, auto b) { report.that(what, count, a == b); };
  same("nan", ours.counts.nan, exact.counts.nan);
  same("posinf", ours.counts.posinf, exact.counts.posinf);
  same("neginf", ours.counts.neginf, exact.counts.neginf);
  same("zero", ours.counts.zero, exact.counts.zero);
  same("subnormal", ours.counts.subnormal, exact.counts.subnormal);
  same("above_fp16_max", ours.counts.above_fp16_max, exact.counts.above_fp16_max);
  same("below_fp16_min", ours.counts.below_fp16_min, exact.counts.below_fp16_min);
  same("first", ours.counts.first, exact.counts.first);
  same("absmax", ours.absmax, exact.absmax);
  same("min_nonzero", ours.min_nonzero, exact.min_nonzero);
  for (int bin = 0; bin < mlpkit::kHistogramBins; ++bin) same("histogram", ours.histogram[bin], exact.histogram[bin]);
}

void census(Report& report) {
  Draw draw(31);
  for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16})
    for (const int64_t count : {0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 65, 130, 4095, 4096, 4097, 9000})
      for (const bool ordinary : {false, true})
        for (const bool histogram : {false, true}) {
          Memory memory(count * size_of(dtype), size_of(dtype), draw);
          fill(memory, dtype, count, ordinary, draw);
          CensusResult ours, exact{};
          exact.counts.first = -1;
          for (int64_t i = 0; i < count; ++i) count_one(get(dtype, memory.data(), i), i, dtype, histogram, exact);
          mlpkit::cpu::census({dtype, memory.data(), count, histogram, &ours});
          compare(ours, exact, count, report);
        }
}

NATIVE_CHECK(census, census);

}  // namespace
