// csrc/cuda/device.h for the host compiler: the same kernels, run lane by lane on the CPU (emulation).
//
// Lanes are fibers. They run in random order and change only at shuffles, where all 32 must meet. Every access to
// global memory must lie in an allocation that the test has named and be aligned to its size.
#pragma once
#include <cstdint>
#include <functional>

#include "core/dtype.h"
#include "cuda_runtime_api.h"

#define MLPKIT_KERNEL(threads, blocks) void
#define MLPKIT_DEVICE inline

namespace mlpkit::device {

constexpr int kWarp = 32;

uint32_t block_index();
uint32_t thread_index();

// Waits until every lane of the warp has given its 8 bytes, then returns those of `from_lane`.
uint64_t exchange(uint64_t bits, uint32_t from_lane);
// Stops the run with a message unless [address, address + bytes) may be read (or written) and is aligned to `bytes`.
void check(const void* address, int bytes, bool writes);
// Runs body() for every thread of every block; false if a check failed.
bool run(int64_t blocks, int threads, const std::function<void()>& body);

template <class F>
F shuffle(F value, uint32_t from_lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(F));
  bits = exchange(bits, from_lane);
  memcpy(&value, &bits, sizeof(F));
  return value;
}
template <class F>
F shuffle_xor(F value, uint32_t lane_mask) {
  return shuffle(value, (thread_index() % kWarp) ^ lane_mask);
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Half x) { return to_float(x); }
inline int64_t widen(int64_t x) { return x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) { to = to_bfloat16(x); }
inline void narrow(float x, Half& to) { to = to_half(x); }

template <class T, class C>
void load(const T* from, C& to) {
  check(from, sizeof(T), false);
  to = widen(*from);
}
template <class T, class C>
void store(T* to, C from) {
  check(to, sizeof(T), true);
  narrow(from, *to);
}
template <class T, class C>
void load16(const T* from, C* to) {
  check(from, 16, false);
  for (unsigned i = 0; i < 16 / sizeof(T); ++i) to[i] = widen(from[i]);
}
template <class T, class C>
void store16(T* to, const C* from) {
  check(to, 16, true);
  for (unsigned i = 0; i < 16 / sizeof(T); ++i) narrow(from[i], to[i]);
}
inline uint32_t load4(const uint8_t* from) {
  check(from, 4, false);
  return *reinterpret_cast<const uint32_t*>(from);
}
inline void store4(uint8_t* to, uint32_t from) {
  check(to, 4, true);
  *reinterpret_cast<uint32_t*>(to) = from;
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t, const Args&... args) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return run(blocks, threads, [&] { kernel(args...); }) ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace mlpkit::device
