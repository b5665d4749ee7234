// Two numbers of torch's own generator (ops).
#include "ops/drawn_seed.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/TransformationHelper.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>
#include <mutex>

namespace mlpkit {
namespace {

// Modes, transforms, tracers and observers include a key of theirs for this thread.
bool unobserved() {
  const c10::DispatchKeySet usual = c10::default_included_set | c10::autocast_dispatch_keyset;
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty();
}

}  // namespace

at::Tensor drawn_seed(at::Device device) {
  constexpr int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  if (!device.is_cpu() || !unobserved()) return at::randint(low, high, {2}, options);
  at::Tensor seed = at::empty({2}, options);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  auto* source = at::check_generator<at::CPUGeneratorImpl>(generator);
  constexpr uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  for (int i = 0; i < 2; ++i)
    seed.mutable_data_ptr<int64_t>()[i] =
        at::transformation::uniform_int_from_to<int64_t>(source->random64(), range, low);
  return seed;
}

}  // namespace mlpkit
