// Scan: largest and smallest magnitude and the number of zeros in one pass (cpu; compiled once for each instruction
// set).
#include "cpu/scan.h"

MLPKIT_BEGIN_ISA
namespace {

constexpr int64_t kBlock = 4096;  // short enough for 16-bit counters

template <class F>
void run(const Scan& args) {
  using Bits = typename F::Bits;
  const Bits* x = static_cast<const Bits*>(args.data);
  Bits top = 0, smallest_less_one = static_cast<Bits>(~Bits{0});
  int64_t zero = 0;
  for (int64_t begin = 0; begin < args.count; begin += kBlock) {
    const int64_t end = args.count - begin < kBlock ? args.count : begin + kBlock;
    Bits zeros = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Bits magnitude = x[i] & F::magnitude;
      top = magnitude > top ? magnitude : top;
      const Bits less_one = static_cast<Bits>(magnitude - 1);  // zero wraps around to the very top
      smallest_less_one = less_one < smallest_less_one ? less_one : smallest_less_one;
      zeros += magnitude == 0;
    }
    zero += zeros;
  }
  const bool finite = top < F::infinity;
  *args.result = {0.0, 0.0, zero, finite};
  if (!finite || top == 0) return;
  args.result->absmax = value_of<F>(top);
  args.result->min_nonzero = value_of<F>(static_cast<Bits>(smallest_less_one + 1));
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
