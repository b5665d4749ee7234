// Scan: largest and smallest magnitude and the number of zeros in one pass (cpu; compiled once for each instruction
// set).
#include "cpu/scan.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr int64_t kBlock = 4096;  // short enough for 16-bit counters, and for the second look to find it in the cache

template <class F>
void run(const Scan& args) {
  using Bits = typename F::Bits;
  const Bits* x = static_cast<const Bits*>(args.data);
  Bits top = 0, bottom = static_cast<Bits>(~Bits{0});
  int64_t zero = 0;
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    const int64_t end = args.count - begin < kBlock ? args.count : begin + kBlock;
    Bits lowest = static_cast<Bits>(~Bits{0});
    for (int64_t i = begin; i < end; ++i) {
      const Bits magnitude = x[i] & F::magnitude;
      top = magnitude > top ? magnitude : top;
      lowest = magnitude < lowest ? magnitude : lowest;
    }
    bottom = lowest < bottom ? lowest : bottom;
    if (lowest > 0) continue;
    Bits zeros = 0;
    for (int64_t i = begin; i < end; ++i) zeros += (x[i] & F::magnitude) == 0;
    zero += zeros;
  }
  const bool finite = top < F::infinity;
  *args.result = {0.0, 0.0, zero, finite};
  if (!finite || args.count == 0) return;
  args.result->absmax = value_of<F>(top);
  args.result->absmin = value_of<F>(bottom);
}

}  // namespace

void scan(const Scan& args) {
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
