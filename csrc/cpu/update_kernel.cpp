// Optimizer updates and the inspection before them (cpu; compiled once for each instruction set).
#include "cpu/update.h"

#include "cpu/simd_updates.h"

MLPKIT_BEGIN_ISA
namespace {

// The largest magnitude seen. As integers, magnitudes order like floats, with NaN above Inf.
class Largest {
 public:
  MLPKIT_HD void see(FloatVec v) {
    const IntVec magnitude = (IntVec)v & 0x7fffffff;
    lanes_ = magnitude > lanes_ ? magnitude : lanes_;
  }
  MLPKIT_HD void add_to(float* largest) const {
    int32_t top = math::bits_as<int32_t>(*largest);
    for (int i = 0; i < kLanes; ++i) top = lanes_[i] > top ? lanes_[i] : top;
    *largest = math::bits_as<float>(top);
  }

 private:
  IntVec lanes_{};
};

template <class Formula>
MLPKIT_HD void update_by(const Update args, const OptimizerSettings settings) {  // no store below can change a copy
  Largest largest;
  const auto apply = [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    FloatVec p = load_part<FloatVec>(args.p + at, n), g = load_part<FloatVec>(args.g + at, n);
    FloatVec first{}, second{}, none{};
    if (args.first) first = load_part<FloatVec>(args.first + at, n);
    if (args.second) second = load_part<FloatVec>(args.second + at, n);
    Formula::update(settings, p, g * args.scale, first, second, none);
    store_part(args.p + at, p, n);
    if (args.first) store_part(args.first + at, first, n);
    if (args.second) store_part(args.second + at, second, n);
    largest.see(p);
    largest.see(first);
    largest.see(second);
  };
  int64_t at = 0;
  for (; at + kLanes <= args.count; at += kLanes) apply(at, kLanes);
  if (at < args.count) apply(at, args.count - at);
  if (args.largest) largest.add_to(args.largest);
}

template <class Formula>
void update_with(const Update& args) {
  OptimizerSettings usual = args.settings;
  if (usual.l1 != 0 || usual.amsgrad || usual.centered || (__is_same(Formula, Adam) && usual.inverse_root2 == 0))
    return update_by<Formula>(args, args.settings);
  // As constants these leave the loop.
  usual.l1 = 0;
  usual.amsgrad = usual.centered = false;
  if (usual.kind == Optimizer::adam && usual.weight_decay == 0) {
    usual.weight_decay = 0;
    return update_by<Formula>(args, usual);
  }
  update_by<Formula>(args, usual);
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
  Largest largest;
  IntVec signs{};
  for (int64_t at = 0; at < args.count; at += kLanes) {
    const int64_t n = args.count - at;
    largest.see(load_part<FloatVec>(args.p + at, n));
    if (args.first) largest.see(load_part<FloatVec>(args.first + at, n));
    if (args.second) {
      const FloatVec second = load_part<FloatVec>(args.second + at, n);
      largest.see(second);
      signs |= (IntVec)second;
    }
  }
  for (int i = 0; i < kLanes; ++i) *args.negative = *args.negative || signs[i] < 0;
  largest.add_to(args.largest);
}

MLPKIT_END_ISA
