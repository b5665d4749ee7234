// Optimizer updates and the inspection before them (cpu; compiled once for each instruction set).
#include "cpu/update.h"

#include "cpu/simd_updates.h"

MLPKIT_BEGIN_ISA
namespace {

template <class Formula>
void update_with(const Update& args) {
  const OptimizerSettings settings = args.settings;  // what is stored below cannot change a copy
  const auto apply = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    FloatVec p = load_part<FloatVec>(args.p + at, n), g = load_part<FloatVec>(args.g + at, n);
    FloatVec first{}, second{}, none{};
    if (args.first) first = load_part<FloatVec>(args.first + at, n);
    if (args.second) second = load_part<FloatVec>(args.second + at, n);
    Formula::update(settings, p, g * args.scale, first, second, none);
    store_part(args.p + at, p, n);
    if (args.first) store_part(args.first + at, first, n);
    if (args.second) store_part(args.second + at, second, n);
  };
  int64_t at = 0;
  for (; at + kLanes <= args.count; at += kLanes) apply(at, kLanes);
  if (at < args.count) apply(at, args.count - at);
}

}  // namespace

void update(const Update& args) {
  switch (args.settings.kind) {
    case Optimizer::sgd:
      return update_with<Sgd>(args);
    case Optimizer::adam:
    case Optimizer::adamw:
      return update_with<Adam>(args);
    case Optimizer::rmsprop:
      return update_with<Rmsprop>(args);
    case Optimizer::lars:
    case Optimizer::lamb:
      return;
  }
}

void inspect(const Inspect& args) {
  // As integers, magnitudes order like floats, with NaN above Inf.
  IntVec largest{}, signs{};
  for (int64_t at = 0; at < args.count; at += kLanes) {
    const int64_t n = args.count - at;
    const auto see = [&](const float* from) __attribute__((always_inline)) {
      const IntVec magnitude = load_part<IntVec>(from + at, n) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    };
    see(args.p);
    if (args.first) see(args.first);
    if (args.second) {
      see(args.second);
      signs |= load_part<IntVec>(args.second + at, n);
    }
  }
  int32_t top = math::bits_as<int32_t>(*args.largest);
  for (int i = 0; i < kLanes; ++i) {
    *args.negative = *args.negative || signs[i] < 0;
    top = largest[i] > top ? largest[i] : top;
  }
  *args.largest = math::bits_as<float>(top);
}

MLPKIT_END_ISA
