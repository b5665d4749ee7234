// A member's update and what must be known before it (cuda): largest magnitudes.
#pragma once
#include "cuda/population_pass.h"

namespace mlpkit::cuda {

// The magnitudes' bits order like numbers, NaN above Inf.
MLPKIT_DEVICE uint32_t magnitude_of(const float (&values)[4], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t one = math::bits_as<uint32_t>(values[i]) & 0x7fffffffu;
    largest = one > largest ? one : largest;
  }
  return largest;
}

// The largest of each warp, for all to read after a barrier.
MLPKIT_DEVICE void largest_seen(uint32_t* of_warps, uint32_t largest) {
  largest = device::reduce_max(largest);
  if (device::thread_index() % device::kWarp == 0)
    device::store(of_warps + device::thread_index() / device::kWarp, largest);
}
MLPKIT_DEVICE float largest_in(const uint32_t* of_warps, int warps) {
  uint32_t largest = 0;
  for (int warp = 0; warp < warps; ++warp) {
    uint32_t one;
    device::load(of_warps + warp, one);
    largest = one > largest ? one : largest;
  }
  return math::bits_as<float>(largest);
}

// The largest magnitude in parameters and moments; NaN's where a second moment is negative, of which nothing is proven.
MLPKIT_DEVICE uint32_t inspect_member(const MemberJob& job, int thread, int threads) {
  uint32_t largest = 0;
#pragma unroll 1
  for (int at = 4 * thread; at < job.plan.floats; at += 4 * threads) {
    float values[4];
    device::load16(device::global(job.values + at), values);
    largest = magnitude_of(values, largest);
    if (job.first) {
      device::load16(device::global(job.first + at), values);
      largest = magnitude_of(values, largest);
    }
    if (!job.second) continue;
    device::load16(device::global(job.second + at), values);
    largest = magnitude_of(values, largest);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (values[i] < 0.f) largest = 0x7fffffffu;
  }
  return largest;
}

// One update by a formula of core/optimizer.h; writes: parameters, moments and what is multiplied, otherwise only
// looks. Returns the largest magnitude that this thread would leave.
template <class T, class Formula>
MLPKIT_DEVICE uint32_t update_member(const MemberPass<T>& pass, const MemberJob& job, const OptimizerSettings& of_step,
                                     const float* gradients, float scale, bool writes) {
  const OptimizerSettings settings = of_step;
  const int thread = pass.thread(), threads = pass.threads();
  uint32_t largest = 0;
  const auto four = [&](int at, float (&p)[4]) {
    float g[4], first[4] = {}, second[4] = {}, none = 0.f;
    device::load16(gradients + at, g);
    device::load16(device::global(job.values + at), p);
    if (job.first) device::load16(device::global(job.first + at), first);
    if (job.second) device::load16(device::global(job.second + at), second);
#pragma unroll
    for (int i = 0; i < 4; ++i) Formula::update(settings, p[i], g[i] * scale, first[i], second[i], none);
    largest = magnitude_of(second, magnitude_of(first, magnitude_of(p, largest)));
    if (!writes) return;
    device::store16(device::global(job.values + at), p);
    if (job.first) device::store16(device::global(job.first + at), first);
    if (job.second) device::store16(device::global(job.second + at), second);
  };
  for (int i = 0; i < job.layers; ++i) {
    const MemberLayer& layer = job.layer[i];
    const int weights = 64 * tiles_of(layer.in) * tiles_of(layer.out), biases = 4 * tiles_of(layer.out);
    const int last = weights + biases + (layer.slope >= 0 ? 1 : 0);
    // Bias and slope follow the weight.
#pragma unroll 2
    for (int quad = thread; quad < last; quad += threads) {
      float p[4];
      four(layer.weight + 4 * quad, p);
      if (!writes) continue;
      if (quad < weights)
        pass.put_weights(i, quad, p);
      else if (quad < weights + biases)
        device::store16(pass.floats(job.plan.bias[i]) + 4 * (quad - weights), p);
    }
  }
  return largest;
}

}  // namespace mlpkit::cuda
