// csrc/cuda/device.h for the host compiler: the same kernels, run thread by thread on the CPU (emulation).
//
// Threads are fibers. They run in random order and change only where they meet: the lanes of a warp at shuffles, votes
// and tensor-core instructions, a block at barriers. What the emulator stops with a message:
//   - an access outside every global allocation that the test has named and every shared array, or not aligned;
//   - a read of shared memory that nobody wrote, or that a cp.async has not been waited for;
//   - two threads that touch the same shared byte, one of them writing, with no barrier between them;
//   - lanes that meet at different instructions, threads that wait for others that never come.
#pragma once
#include <cstdint>
#include <functional>

#include "core/dtype.h"
#include "cuda_runtime_api.h"

#define MLPKIT_KERNEL(threads, blocks) void
#define MLPKIT_DEVICE inline
// A tag of its own for each array of each instance of a kernel.
#define MLPKIT_SHARED(T, name, count) \
  static const char name##_tag = 0;   \
  T* const name = static_cast<T*>(::mlpkit::device::static_shared(&name##_tag, sizeof(T) * (count)))

namespace mlpkit::device {

constexpr int kWarp = 32;
constexpr bool kTensorCores = true;

struct Bits16 {
  uint32_t v[4];
};

enum class Format : int { bfloat16, float16, tf32 };

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  bool mostly_shared = false;
};

// What emulator.cpp, memory.cpp and tensor.cpp do.
void* static_shared(const void* tag, int bytes);
void check(const void* address, int bytes, bool writes);
void copy_later(void* to, const void* from, int bytes, int valid);
void land(int groups_in_flight);
void vote(const char* what, uint32_t value, uint32_t (&all)[kWarp]);
void matrix_load(const void* row, bool transposed, int count, uint32_t* to);
void matrix_product(Format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// Waits until every lane of the warp has given its 8 bytes, then returns those of `from_lane`.
uint64_t exchange(uint64_t bits, uint32_t from_lane);
// Runs body() for every thread of every block; not cudaSuccess if a check failed.
cudaError_t run(const Grid& grid, const std::function<void()>& body);

uint32_t block_index();
uint32_t blocks();
uint32_t thread_index();
unsigned char* shared_memory();
int multiprocessors();
int shared_memory_limit();
inline int capability() { return 90; }

void sync_part(int barrier, int threads);
void sync();
void sync_warp();
inline void fence() {}

inline uint32_t atomic_add(uint32_t* to, uint32_t value) {
  check(to, 4, true);
  const uint32_t before = *to;
  *to += value;
  return before;
}

inline void atomic_max(uint32_t* to, uint32_t value) {
  check(to, 4, true);
  *to = value > *to ? value : *to;
}
inline void atomic_add(uint64_t* to, uint64_t value) {
  check(to, 8, true);
  *to += value;
}
inline void atomic_max(uint64_t* to, uint64_t value) {
  check(to, 8, true);
  *to = value > *to ? value : *to;
}

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
inline uint32_t ballot(bool is) {
  uint32_t all[kWarp], bits = 0;
  vote("ballot", is, all);
  for (int lane = 0; lane < kWarp; ++lane) bits |= all[lane] << lane;
  return bits;
}
inline uint32_t reduce_add(uint32_t value) {
  uint32_t all[kWarp], sum = 0;
  vote("reduce_add", value, all);
  for (const uint32_t one : all) sum += one;
  return sum;
}
inline uint32_t reduce_max(uint32_t value) {
  uint32_t all[kWarp], most = 0;
  vote("reduce_max", value, all);
  for (const uint32_t one : all) most = one > most ? one : most;
  return most;
}
inline uint32_t reduce_or(uint32_t value) {
  uint32_t all[kWarp], bits = 0;
  vote("reduce_or", value, all);
  for (const uint32_t one : all) bits |= one;
  return bits;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Half x) { return to_float(x); }
inline int64_t widen(int64_t x) { return x; }
inline uint32_t widen(uint32_t x) { return x; }
inline uint64_t widen(uint64_t x) { return x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) { to = to_bfloat16(x); }
inline void narrow(float x, Half& to) { to = to_half(x); }
inline void narrow(int64_t x, int64_t& to) { to = x; }
inline void narrow(uint32_t x, uint32_t& to) { to = x; }
inline void narrow(uint64_t x, uint64_t& to) { to = x; }

template <class T>
float2 widen_pair(uint32_t pair, T) {
  return {widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})};
}
template <class T>
uint32_t narrow_pair(float low, float high, T) {
  T pair[2];
  narrow(low, pair[0]);
  narrow(high, pair[1]);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
}

template <class T>
T* global(T* pointer) {
  return pointer;
}

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
inline uint32_t load4(const void* from) {
  check(from, 4, false);
  uint32_t bits;
  memcpy(&bits, from, 4);
  return bits;
}
inline uint32_t load1(const void* from) {
  check(from, 1, false);
  return *static_cast<const uint8_t*>(from);
}
inline void store4(void* to, uint32_t from) {
  check(to, 4, true);
  memcpy(to, &from, 4);
}
inline void store1(void* to, uint32_t from) {
  check(to, 1, true);
  *static_cast<uint8_t*>(to) = static_cast<uint8_t>(from);
}
inline float2 load_pair(const float* from) {
  check(from, 8, false);
  return {from[0], from[1]};
}
inline void store_pair(float* to, float low, float high) {
  check(to, 8, true);
  to[0] = low, to[1] = high;
}
inline Bits16 load_bits16(const void* from) {
  check(from, 16, false);
  Bits16 bits;
  memcpy(&bits, from, 16);
  return bits;
}
inline void store_bits16(void* to, const Bits16& from) {
  check(to, 16, true);
  memcpy(to, &from, 16);
}
inline Bits16 load_bits16_once(const void* from) { return load_bits16(from); }
inline void store_bits16_once(void* to, const Bits16& from) { store_bits16(to, from); }

inline void copy16_async(void* to, const void* from, bool valid = true) { copy_later(to, from, 16, valid ? 16 : 0); }
inline void copy4_async(void* to, const void* from, bool valid = true) { copy_later(to, from, 4, valid ? 4 : 0); }
void commit_copies();
template <int groups_in_flight>
void wait_for_copies() {
  land(groups_in_flight);
}

template <bool transposed, int count>
void load_matrices(const void* row, uint32_t (&to)[count]) {
  matrix_load(row, transposed, count, to);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  matrix_product(Format::bfloat16, d, a, b);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  matrix_product(Format::float16, d, a, b);
}
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  matrix_product(Format::tf32, d, a, b);
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t, const Args&... args) {
  if (grid.blocks <= 0) return cudaSuccess;
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return run(grid, [&] { kernel(args...); });
}

}  // namespace mlpkit::device
